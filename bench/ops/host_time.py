"""Host time: what a block costs in Python and in PyTorch's dispatcher before any work is done.

One visible patch of one site and one thread: what is left of a call is the cost of calling. On a GPU a small model's
step cannot be faster than this. Beside ours: timm's eager block, whose width, form and map are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import convnextv2_kernels as ck
from convnextv2_kernels.benchmark import machine
from convnextv2_kernels.benchmark.timing import Budget, Control, summarize, time_interleaved
from convnextv2_kernels.models import get_config

SAMPLE_SECONDS = 0.02
BASELINE = "timm eager block"


def fused_dense_block(width: int) -> nn.Module:
    """A block under the official names after ``fuse``: what a dense model's blocks become."""
    from helpers.official import Block

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(width)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    holder = Holder().train()
    report = ck.fuse(holder)
    if report.skipped or not report.replaced:
        raise RuntimeError(f"fuse left the official block alone:\n{report}")
    return holder.block


def packed_block(width: int) -> Callable[[Tensor], Tensor]:
    """Our layer on packed patches, one visible patch."""
    layout = ck.PatchLayout.from_mask(torch.zeros(1, 1, 1, dtype=torch.bool))
    block = ck.nn.ConvNeXtV2Block(width).train()
    return lambda x: block(x, layout)


def timm_block(width: int) -> nn.Module:
    """timm's block of a V2 model; raises ImportError where timm is not installed."""
    from helpers.reference_models import timm
    from timm.models.convnext import ConvNeXtBlock

    del timm
    return ConvNeXtBlock(width, use_grn=True, ls_init_value=None).train()


def blocks(width: int) -> tuple[dict[str, tuple[Callable[[Tensor], Tensor], Tensor]], dict[str, str]]:
    """By name a block and an input of one site [1, C, 1, 1] (packed: [1, 1, 1, C]), and why others are left out."""
    torch.manual_seed(0)
    dense, packed = torch.randn(1, width, 1, 1), torch.randn(1, 1, 1, width)
    found: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "block, packed": (packed_block(width), packed),
        "block, fused dense": (fused_dense_block(width), dense),
    }
    reasons: dict[str, str] = {}
    try:
        found[BASELINE] = (timm_block(width), dense)
        found[f"{BASELINE} copy"] = (timm_block(width), dense)
    except ImportError as error:
        reasons[BASELINE] = f"timm is not installed ({error})"
    return found, reasons


def calls_of(block: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], object]]:
    """A forward pass with its graph, and forward and backward; gradients accumulate, as nobody reads them."""
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        cotangent = torch.ones_like(block(leaf))
    return {"forward": lambda: block(leaf), "forward and backward": lambda: block(leaf).backward(cotangent)}


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def measure(model_name: str, rounds: int, budget: Budget) -> dict:
    """Microseconds of a call by block and pass, JSON-ready; the control is timm's block against another of its kind."""
    width = get_config(model_name).dims[0]
    found, reasons = blocks(width)
    result: dict = {"model": model_name, "width": width, "left_out": reasons, "passes": {}}
    with machine.threads(1):
        made = {name: calls_of(*pair) for name, pair in found.items()}
        for kind in ("forward", "forward and backward"):
            result["passes"][kind] = _measure_pass({name: calls[kind] for name, calls in made.items()}, rounds, budget)
    return result


def _measure_pass(calls: dict[str, Callable[[], object]], rounds: int, budget: Budget) -> dict:
    repeats = {}
    for name, call in calls.items():
        for _ in range(10):
            call()
        start = time.perf_counter()
        repeated(call, 10)()
        repeats[name] = max(1, math.ceil(10 * SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-9)))
    steps = {name: repeated(call, repeats[name]) for name, call in calls.items()}
    samples = time_interleaved(steps, rounds, budget.deadline, budget.clock)
    each = {name: [seconds / repeats[name] for seconds in found] for name, found in samples.items()}
    copy = each.pop(f"{BASELINE} copy", None)
    if copy is None:
        control = Control(BASELINE, None, "timm is not installed")
    else:
        control = Control.from_samples(BASELINE, each[BASELINE], copy)
    variants = {}
    for name, seconds in each.items():
        times = summarize(seconds)
        variants[name] = {"median_us": 1e3 * times["median_ms"], **times}
    return {"variants": variants, "control": control.to_json()}
