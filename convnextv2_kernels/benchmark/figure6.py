"""Throughput and memory of masked pre-training by model size: masked dense PyTorch against every backend of ours.

The comparison of ConvNeXt V2's Figure 6 (Appendix C.1): 224 px, mask ratio 0.6, forward and backward. There the
opponent of the sparse engine is dense convolution that multiplies by the mask; so it is here, in both memory formats,
eager and compiled, with whichever pointwise layers are faster on this machine; and once as it is commonly written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import backends
from ..models import CONFIGS
from . import fits, memory
from .baseline import MEMORY_FORMATS, POINTWISE, Variant
from .correctness import check_arms
from .device import OUT_OF_MEMORY, available_bytes, dense_at_its_best, free_memory, out_of_memory, synchronized
from .options import DTYPES, Budget
from .peak import arguments_for
from .step import check_losses, compiled_arms, flops_of, step_saved_bytes, time_arms
from .timing import summarize, time_interleaved
from .variants import MASK_RATIO, SPARSE, Arm, Batch, make_batch, make_dense, make_sparse, served_by

TUNED = ("linear", "conv1x1")
COMMON = Variant("channels_last", "plain")  # slower than the tuned ones, and what a port usually does
PEAK_TIMEOUT = 1800.0
# Why something of a size was not measured; it is when the same size is asked for with more effort.
NOT_ASKED, OUT_OF_TIME = "not asked for", "time budget"
# Shares of a size's work, for the progress bar; rough.
SHARES = {"gate": 0.1, "probe": 0.1, "compile": 0.15, "bytes": 0.1, "time": 0.3, "peak": 0.25}


@dataclass(frozen=True)
class Settings:
    """What to compare; the defaults are the paper's. ``mask_ratio`` hides that share of the patches."""

    models: tuple[str, ...] = tuple(CONFIGS)
    batch_size: int = 64
    img_size: int = 224
    mask_ratio: float = MASK_RATIO
    repeats: int = 20
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = True
    peak: bool = True
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def our_backends(device: str, dtype: torch.dtype) -> list[str]:
    """Backends that can serve the step; "auto" is one of its own where it mixes others."""
    names = [name for name in ("reference", "cpu", "triton", "cuda") if not backends.why_not(name, device, dtype)]
    automatic = backends.automatic("convnextv2_block", device, (dtype,))
    return names if automatic in names else [*names, "auto"]


def our_arm(device: str, dtype: torch.dtype) -> str:
    """Name of the arm that users get without asking for a backend."""
    automatic = backends.automatic("convnextv2_block", device, (dtype,))
    return f"{SPARSE} {automatic if automatic in our_backends(device, dtype) else 'auto'}"


def left_out(model: str, settings: Settings) -> str | None:
    """Why a size is not tried: it would not fit. On a GPU every size is tried, as running out of memory is no harm."""
    if settings.device != "cpu":
        return None
    needed = fits.needed_bytes(model, settings.batch_size, settings.img_size, COMMON)  # it saves the most
    return fits.why_not(needed, available_bytes(settings.device))


def measure_size(
    model: str, settings: Settings, budget: Budget, log: Callable[[str], None], advance: Callable[[float], None]
) -> dict:
    """Check, time and weigh all arms of one size; JSON-ready.

    ``advance`` is told the share of the work that has just been done.

    Raises:
        GateError: before anything is timed, when two arms disagree.
        RuntimeError: memory runs out in our arm, or in every tuned dense one.
    """
    with dense_at_its_best():
        result = _measure_in_process(model, settings, budget, log, advance)
    torch._dynamo.reset()  # compiled functions keep their networks alive
    free_memory(settings.device)
    arms = result["arms"]
    for name, arm in arms.items():
        if settings.peak and not budget.spent:
            log(f"{model}: peak memory of {name}")
            arm["peak"] = memory.peak_in_subprocess(_peak_arguments(name, result, model, settings), PEAK_TIMEOUT)
        else:
            arm["peak"] = {"bytes": None, "reason": OUT_OF_TIME if settings.peak else NOT_ASKED}
        advance(SHARES["peak"] / len(arms))
    return {**result, "ratios": ratios(arms, result["ours"])}


def _measure_in_process(model: str, settings: Settings, budget: Budget, log, advance) -> dict:
    dtype, device = settings.torch_dtype, settings.device
    batch = make_batch(settings.batch_size, settings.img_size, settings.seed, dtype, device, settings.mask_ratio)
    base = make_sparse(model, settings.seed, device)
    ours = [served_by(base, name) for name in our_backends(device, dtype)]
    candidates = make_dense(base, [Variant(layout, kind) for layout in MEMORY_FORMATS for kind in TUNED])
    log(f"{model}: comparing losses and gradients with float64")
    gates = check_arms(ours, candidates[:2], batch)
    advance(SHARES["gate"])

    log(f"{model}: choosing the faster pointwise layers of the dense network")
    skipped: dict[str, str] = {}
    candidates = [arm for arm in candidates if _fits(arm, batch, skipped)]
    if not candidates:
        raise torch.OutOfMemoryError("no masked dense variant fits")
    probe = _probe(candidates, batch)
    layouts = dict.fromkeys(arm.variant.layout for arm in candidates)
    dense = [_faster(candidates, layout, probe) for layout in layouts]
    advance(SHARES["probe"])
    # The compiler is given every kind, in the layout that is faster eager; it chooses layouts inside itself.
    layout = min(dense, key=lambda arm: probe[arm.name]).variant.layout
    variants = [Variant(layout, kind, compiled=True) for kind in POINTWISE]
    compiled, not_compiled = [], {variant.name: NOT_ASKED for variant in variants}
    if settings.compile:
        compiled, not_compiled = compiled_arms(base, variants, batch, budget, log)
        found = _probe(compiled, batch) if compiled else {}
        probe |= found
        compiled = [_faster(compiled, layout, found)] if compiled else []
    skipped |= not_compiled
    advance(SHARES["compile"])
    common = [arm for arm in make_dense(base, [COMMON]) if _fits(arm, batch, skipped)]
    arms = [*common, *dense, *compiled, *ours]
    expected = ours[-1].forward(batch)[0].detach().double()
    check_losses(arms, batch, expected)

    log(f"{model}: bytes saved for backward")
    saved = {arm.name: step_saved_bytes(arm, batch) for arm in arms}
    advance(SHARES["bytes"])
    log(f"{model}: timing {len(arms)} arms, interleaved")
    part = SHARES["time"] / settings.repeats
    timing = budget.part(0.5) if settings.peak else budget
    samples = time_arms(arms, batch, settings.repeats, timing, warmup=1, after_round=lambda: advance(part))
    rounds = len(samples[arms[0].name])
    advance(part * (settings.repeats - rounds))
    return {
        "model": model,
        "ours": our_arm(device, dtype),
        "parameters_bytes": sum(p.nbytes for p in base.model.parameters()),
        "visible_patches": int((~batch.mask).sum()),
        "patches": batch.mask.numel(),
        "flops": flops_of(base, batch),
        "gate": gates,
        "probe_ms": {name: 1e3 * seconds for name, seconds in probe.items()},
        "arms": {
            arm.name: {
                **summarize(samples[arm.name]),
                "images_per_s": settings.batch_size / (1e-3 * summarize(samples[arm.name])["median_ms"]),
                "saved_bytes": saved[arm.name],
                "variant": _described(arm.variant),
            }
            for arm in arms
        },
        "skipped": skipped,
    }


def _described(variant: Variant | None) -> dict | None:
    return None if variant is None else dict(vars(variant))


def _fits(arm: Arm, batch: Batch, skipped: dict[str, str]) -> bool:
    """Run a dense arm once, which warms it up; False, and noted in ``skipped``, where memory does not suffice."""
    try:
        arm.step(batch)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        skipped[arm.name] = OUT_OF_MEMORY
    if arm.name in skipped:  # not in the handler, where the error's traceback keeps the activations alive
        arm.model.zero_grad(set_to_none=True)
        free_memory(batch.images.device.type)
    return arm.name not in skipped


def _probe(candidates: Sequence[Arm], batch: Batch) -> dict[str, float]:
    """Seconds of a step of each dense variant, which is warm, the better of two."""
    device = batch.images.device.type
    steps = {arm.name: synchronized(lambda arm=arm: arm.step(batch), device) for arm in candidates}
    return {name: min(seconds) for name, seconds in time_interleaved(steps, 2).items()}


def _faster(candidates: Sequence[Arm], layout: str, probe: dict[str, float]) -> Arm:
    return min((arm for arm in candidates if arm.variant.layout == layout), key=lambda arm: probe[arm.name])


def _peak_arguments(name: str, result: dict, model: str, settings: Settings) -> list[str]:
    variant = result["arms"][name]["variant"]
    return arguments_for(
        None if variant is None else Variant(**variant),
        model,
        settings.batch_size,
        settings.img_size,
        settings.dtype,
        torch.get_num_threads(),
        device=settings.device,
        backend=name.removeprefix(f"{SPARSE} ") if variant is None else "auto",
        mask_ratio=settings.mask_ratio,
    )


def complete(size: dict, settings: Settings) -> bool:
    """Whether a size was measured with at least the effort that is asked for now."""
    reasons = set(size["skipped"].values()) if settings.compile else set()
    if settings.peak:
        reasons |= {arm["peak"].get("reason") for arm in size["arms"].values()}
    rounds = min(len(arm["samples_ms"]) for arm in size["arms"].values())
    return rounds >= settings.repeats and not reasons & {NOT_ASKED, OUT_OF_TIME}


def peak_of(arm: dict) -> int | None:
    """Peak bytes of a step, None where they were not measured."""
    return (arm["peak"] or {}).get("bytes")


def ratios(arms: dict[str, dict], ours: str) -> dict:
    """Our arm against the fastest dense arm, the fastest eager one and the most frugal ones."""
    dense = {name: arm for name, arm in arms.items() if not name.startswith(SPARSE)}
    eager = {name: arm for name, arm in dense.items() if not arm["variant"]["compiled"]}
    fastest, fastest_eager = (min(group, key=lambda name: group[name]["median_ms"]) for group in (dense, eager))
    frugal = min(dense, key=lambda name: dense[name]["saved_bytes"])
    mine = arms[ours]
    found = {
        "fastest_dense": fastest,
        "throughput": dense[fastest]["median_ms"] / mine["median_ms"],
        "fastest_eager": fastest_eager,
        "throughput_eager": dense[fastest_eager]["median_ms"] / mine["median_ms"],
        "frugal_dense": frugal,
        "saved": dense[frugal]["saved_bytes"] / mine["saved_bytes"],
    }
    if peak_of(mine) and all(peak_of(arm) for arm in dense.values()):
        least = min(dense, key=lambda name: peak_of(dense[name]))
        found |= {"least_peak_dense": least, "peak": peak_of(dense[least]) / peak_of(mine)}
    return found
