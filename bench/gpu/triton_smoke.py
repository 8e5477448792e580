"""Every public op by the Triton backend, forward and backward, against the float64 reference; the MLP and the block
also by CUDA kernels with Triton's fused products, and at sizes where the plans take those."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from convnextv2_kernels.benchmark.machine import unsupported_reason

from .results import Recorder
from .setting import Setting, Skip
from .smoke import cases
from .triton_setup import compile_ahead, require

# ops whose GEMMs Triton fuses, and the backend of CUDA kernels that takes them
FUSED_OPS = ("pointwise_mlp", "gathered_pointwise_mlp", "convnextv2_block")
MIXED = "cuda+triton"
# of images of many rows, whole tiles of them or not: where and how wide the committed plans fuse in 16 bits
FUSED_PLACES = ((("uniform", 16), 40), (("uniform", 8), 96), (("uniform", 8), 192), (("ragged", 8), 96))
DRY_PLACES = ((("uniform", 4), 8),)


class Check(NamedTuple):
    """A sample and the backend it is run by; ``fuses`` where a plan with fused products is expected to serve."""

    op: str
    axes: dict
    dtype: torch.dtype
    backend: str
    fuses: bool

    @property
    def key(self) -> str:
        where = " ".join(str(part) for part in self.axes.get("at", ("small",)) if part is not None)
        where += f" c{self.axes['c']}" if self.fuses else ""
        by = "" if self.backend == "triton" else f" by {self.backend}"
        return f"{self.op} {where} {str(self.dtype).removeprefix('torch.')}{by}"


def checks(dtype: torch.dtype, dry_run: bool) -> list[Check]:
    """All checks of a dtype, those of fused products first."""
    narrow = torch.finfo(dtype).bits == 16
    samples = []
    for at, c in DRY_PLACES if dry_run else FUSED_PLACES if narrow else ():
        for op in FUSED_OPS:
            more = {"k": 7} if op == "convnextv2_block" else {"out_c": None}
            samples.append((op, {"at": at, "c": c, "hidden": None, **more}, True))
    samples += [(op, axes, False) for op, axes in cases(dry_run)]
    result = []
    for op, axes, fuses in samples:
        result.append(Check(op, axes, dtype, "triton", fuses))
        if op in FUSED_OPS:
            result.append(Check(op, axes, dtype, MIXED, fuses))
    return result


@contextlib.contextmanager
def watched() -> Iterator[dict[str, str]]:
    """Inside, notes what fused products have computed: ``{"forward": source of the plan, "backward": ...}``."""
    from convnextv2_kernels.backends.triton import mlp

    seen: dict[str, str] = {}
    before = {name: getattr(mlp, name) for name in ("fused_forward", "fused_backward")}

    def watch(way, function):
        def call(rows, weights, options, plan):
            result = function(rows, weights, options, plan)
            if result is not None:
                seen[way] = plan.source
            return result

        return call

    for name, function in before.items():
        setattr(mlp, name, watch(name.removeprefix("fused_"), function))
    try:
        yield seen
    finally:
        for name, function in before.items():
            setattr(mlp, name, function)


def expected_plan(sample, dtype: torch.dtype):
    """The plan for a sample of the MLP or the block whose output is as wide as its input."""
    from convnextv2_kernels.backends.triton import plans

    layout, hidden, width = sample.constants["layout"], *sample.tensors["w1"].shape
    side = sample.tensors["residual" if sample.op != "convnextv2_block" else "x"].shape[1]
    rows = layout.num_patches * side**2
    return plans.choose(plans.Shape(dtype, width, hidden, width, rows // layout.num_images))


def conform(check: Check, device: str) -> str:
    """ "ok", and for the MLP's products what has computed them; raises where a result is wrong or not as planned."""
    from conformance import tolerance
    from conformance.samples import make_sample

    sample = make_sample(check.op, **check.axes)
    if check.backend == MIXED:
        reason = unsupported_reason(MIXED, device, check.dtype)
        if reason is not None:
            raise Skip(f"{MIXED} cannot run: {reason}")
    with watched() as seen:
        tolerance.check(sample, check.backend, check.dtype, device)
    if check.op not in FUSED_OPS:
        return "ok"
    if check.fuses:
        plan = expected_plan(sample, check.dtype)
        for way, wanted in (("forward", plan.forward_fused), ("backward", plan.backward_fused)):
            assert wanted == (way in seen), f"{way} is {'' if wanted else 'not '}fused in the plan, {plan.source}"
    ways = ", ".join(f"{way} {'fused' if way in seen else 'library'}" for way in ("forward", "backward"))
    sources = " and ".join(sorted(set(seen.values())))
    return f"ok, {ways}" + (f" (plan: {sources})" if seen else "")


def _launch(check: Check, device: str) -> None:
    """Forward and backward, for what they launch."""
    from conformance.samples import make_sample

    sample = make_sample(check.op, **check.axes).cast(check.dtype, device)
    sample.run("triton", torch.ones_like(sample.run("triton")["out"]))


def run(setting: Setting, recorder: Recorder) -> None:
    require(setting)
    from convnextv2_kernels.backends import triton

    torch.set_num_threads(1 if setting.dry_run else 8)
    order = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    for dtype in order[2:3] if setting.dry_run else order:
        if dtype not in triton.DTYPES:
            continue
        name, todo = str(dtype).removeprefix("torch."), checks(dtype, setting.dry_run)
        own = [check for check in todo if check.backend == "triton"]
        recorder.case(
            "compiled",
            name,
            lambda own=own: compile_ahead(lambda c=c: _launch(c, setting.device) for c in own),
            needs=10,
            limit=setting.remaining() + 5,
        )
        for check in todo:
            recorder.case("checks", check.key, lambda check=check: conform(check, setting.device), needs=3)
