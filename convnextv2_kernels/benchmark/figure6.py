"""Throughput and memory of masked pre-training by model size: masked dense PyTorch against every backend of ours.

The comparison of ConvNeXt V2's Figure 6 (Appendix C): 224 px, mask ratio 0.6, forward and backward. There the
baseline of the sparse engine is dense convolution that multiplies by the mask; so it is here, in both memory formats,
eager and compiled, with whichever pointwise layers are faster on this machine; and once as it is commonly written. On a
GPU both sides are also captured in CUDA graphs. The paper's engine is one more variant where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..sizes import V2_NAMES
from . import memory, minkowski
from .baseline import MEMORY_FORMATS, POINTWISE, Baseline
from .correctness import check_variants
from .machine import (
    BACKENDS,
    OUT_OF_MEMORY,
    automatic_backend,
    available_bytes,
    dense_at_its_best,
    free_memory,
    out_of_memory,
    synchronized,
    unsupported_reason,
)
from .step import (
    NOT_REQUESTED,
    OUT_OF_TIME,
    Effort,
    compare,
    compiled_variants,
    fastest_of,
    flops_of,
    is_compiled,
    is_ours,
    peak_of_process,
    ratios,
    with_graphs,
)
from .timing import Budget, time_interleaved
from .variants import SPARSE, Batch, Settings, Variant, make_dense, make_sparse, run_by

TUNED = ("linear", "conv1x1")
COMMON = Baseline("channels_last", "plain")  # slower than the tuned ones, and what a port usually does
# Shares of a size's work, for the progress bar; rough.
SHARES = {"check": 0.1, "probe": 0.1, "compile": 0.15, "time": 0.4, "peak": 0.25}
# A sample on a GPU is as many steps in a row as fill this.
SAMPLE_SECONDS = {"cpu": 0.0, "cuda": 0.03}


@dataclass(frozen=True)
class Figure6Settings(Settings):
    """What to compare; the defaults are the paper's."""

    batch_size: int = 64
    repeats: int = 20
    models: tuple[str, ...] = V2_NAMES
    compile: bool = True
    peak: bool = True


def our_backends(device: str, dtype: torch.dtype) -> list[str]:
    """Backends that can run the step; "auto" is one of its own where it mixes others."""
    names = [name for name in BACKENDS if not unsupported_reason(name, device, dtype)]
    return names if automatic_backend(device, dtype) in names else [*names, "auto"]


def our_variant(device: str, dtype: torch.dtype) -> str:
    """Name of the variant that users get without asking for a backend."""
    automatic = automatic_backend(device, dtype)
    return f"{SPARSE} {automatic if automatic in our_backends(device, dtype) else 'auto'}"


def left_out(model: str, settings: Figure6Settings) -> str | None:
    """Why a size is not tried: it would not fit. On a GPU every size is tried, as running out of memory is no harm."""
    if settings.device != "cpu":
        return None
    needed = memory.needed_bytes(model, settings.batch_size, settings.img_size, COMMON)  # it saves the most
    return memory.shortage(needed, available_bytes(settings.device))


def measure_size(
    model: str, settings: Figure6Settings, budget: Budget, log: Callable[[str], None], advance: Callable[[float], None]
) -> dict:
    """Check, time and weigh all variants of one size; JSON-ready.

    ``advance`` is told the share of the work that has just been done.

    Raises:
        CorrectnessError: before anything is timed, when two variants disagree.
        RuntimeError: memory runs out in our variant, or in every tuned dense one.
    """
    with dense_at_its_best():
        result, variants = _measure_in_process(model, settings, budget, log, advance)
    torch._dynamo.reset()  # compiled functions keep their networks alive
    free_memory(settings.device)
    rows = result["variants"]
    for name, row in rows.items():
        if row["execution"] == "graph":
            row["peak"] = {"bytes": None, "reason": "a graph's memory is its own"}
        elif settings.peak and not budget.spent:
            log(f"{model}: peak memory of {name}")
            row["peak"] = peak_of_process(variants[name], model, settings)
        else:
            row["peak"] = {"bytes": None, "reason": OUT_OF_TIME if settings.peak else NOT_REQUESTED}
        advance(SHARES["peak"] / len(rows))
    return {**result, "ratios": ratios(rows, result["ours"])}


def _measure_in_process(
    model: str, settings: Figure6Settings, budget: Budget, log, advance
) -> tuple[dict, dict[str, Variant]]:
    dtype, device = settings.torch_dtype, settings.device
    batch = settings.make_batch()
    base = make_sparse(model, settings.seed, device)
    ours = [run_by(base, name) for name in our_backends(device, dtype)]
    candidates = make_dense(base, [Baseline(layout, kind) for layout in MEMORY_FORMATS for kind in TUNED])
    log(f"{model}: comparing losses and gradients with float64")
    correctness = check_variants(ours, candidates[:2], batch)
    advance(SHARES["check"])
    chosen = _choose_dense(base, candidates, batch, settings, budget, lambda text: log(f"{model}: {text}"))
    advance(SHARES["probe"] + SHARES["compile"])
    part = SHARES["time"] / settings.repeats
    done = [0]

    def after_round() -> None:
        done[0] += 1
        if done[0] <= settings.repeats:  # graphs are timed in rounds of their own
            advance(part)

    timing = budget.part(0.5) if settings.peak else budget
    effort = Effort(settings.repeats, timing, 1, SAMPLE_SECONDS[device], after_round=after_round)
    say = lambda text: log(f"{model}: {text}")  # noqa: E731
    name = our_variant(device, dtype)
    # The first sets the loss, and must not run out of memory: the one that users get.
    first = sorted(ours, key=lambda variant: variant.name != name)
    engines, engine_skipped = _other_engines(base, batch, candidates[0], say)
    comparison = compare([*first, *chosen.variants, *engines], batch, effort, say)
    if device == "cuda":
        groups = [*(_eager_in(layout) for layout in MEMORY_FORMATS), is_compiled]
        comparison = with_graphs(comparison, first[0], groups, batch, effort)
    advance(part * max(0, settings.repeats - done[0]))
    rows = comparison.rows()
    # dense ones first, as in the paper's figure
    places = [variant.name for variant in (*chosen.variants, *engines, *ours)]
    order = sorted(
        rows,
        key=lambda key: (rows[key]["baseline"] is None, is_ours(rows[key]), places.index(key) if key in places else 99),
    )
    backend = rows[name]["backend"]
    return {
        "model": model,
        "ours": fastest_of(rows, lambda row: is_ours(row) and row["backend"] == backend),
        "parameters_bytes": sum(p.nbytes for p in base.model.parameters()),
        "visible_patches": int((~batch.mask).sum()),
        "patches": batch.mask.numel(),
        "flops": flops_of(base, batch),
        "correctness": correctness,
        "probe_ms": {name: 1e3 * seconds for name, seconds in chosen.probe.items()},
        **comparison.to_json(),
        "variants": {key: rows[key] for key in order},
        "skipped": {**chosen.skipped, **engine_skipped, **comparison.skipped},
    }, {key: times.variant for key, times in comparison.times.items()}


@dataclass
class _Chosen:
    """Dense variants to time, seconds of a step of those that were tried, and why others are left out."""

    variants: list[Variant]
    probe: dict[str, float]
    skipped: dict[str, str]


def _choose_dense(
    base: Variant, candidates: list[Variant], batch: Batch, settings: Figure6Settings, budget: Budget, log
) -> _Chosen:
    """By trial on the batch: in each memory format the faster pointwise layers, and the fastest compiled network."""
    log("choosing the faster pointwise layers of the dense network")
    skipped: dict[str, str] = {}
    candidates = [variant for variant in candidates if _fits(variant, batch, skipped)]
    if not candidates:
        raise torch.OutOfMemoryError("no masked dense variant fits")
    probe = _probe(candidates, batch)
    layouts = dict.fromkeys(variant.baseline.layout for variant in candidates)
    dense = [_faster(candidates, layout, probe) for layout in layouts]
    # The compiler is given every kind, in the layout that is faster eager; it chooses layouts inside itself.
    layout = min(dense, key=lambda variant: probe[variant.name]).baseline.layout
    tried = [Baseline(layout, kind) for kind in POINTWISE]
    compiled, not_compiled = [], {f"{baseline.name} compile": NOT_REQUESTED for baseline in tried}
    if settings.compile:
        compiled, not_compiled = compiled_variants(base, tried, batch, budget, log)
        found = _probe(compiled, batch) if compiled else {}
        probe |= found
        compiled = [_faster(compiled, layout, found)] if compiled else []
    common = [variant for variant in make_dense(base, [COMMON]) if _fits(variant, batch, skipped)]
    return _Chosen([*common, *dense, *compiled], probe, skipped | not_compiled)


def _other_engines(base: Variant, batch: Batch, dense: Variant, log) -> tuple[list[Variant], dict[str, str]]:
    """The paper's own engine where it is installed; else nothing, and nothing is skipped (:func:`minkowski.described`
    says so once)."""
    if not minkowski.installed():
        return [], {}
    log(f"comparing {minkowski.PACKAGE} with float64")
    variant, reason = minkowski.make_variant(base, batch, dense)
    return ([], {minkowski.PACKAGE: reason}) if variant is None else ([variant], {})


def _eager_in(layout: str) -> Callable[[Variant], bool]:
    return lambda v: v.dense and v.execution == "eager" and v.baseline.layout == layout


def _fits(variant: Variant, batch: Batch, skipped: dict[str, str]) -> bool:
    """Run a dense variant once, which warms it up; False, and noted in ``skipped``, where memory does not suffice."""
    try:
        variant.step(batch)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        skipped[variant.name] = OUT_OF_MEMORY
    if variant.name in skipped:  # not in the handler, where the error's traceback keeps the activations alive
        variant.model.zero_grad(set_to_none=True)
        free_memory(batch.device)
    return variant.name not in skipped


def _probe(candidates: Sequence[Variant], batch: Batch) -> dict[str, float]:
    """Seconds of a step of each dense variant, which is warm, the better of two."""
    steps = {v.name: synchronized(lambda v=v: v.step(batch), batch.device) for v in candidates}
    return {name: min(seconds) for name, seconds in time_interleaved(steps, 2).items()}


def _faster(candidates: Sequence[Variant], layout: str, probe: dict[str, float]) -> Variant:
    return min((v for v in candidates if v.baseline.layout == layout), key=lambda v: probe[v.name])


def complete(size: dict, settings: Figure6Settings) -> bool:
    """Whether a size was measured with at least the effort that is asked for now."""
    reasons = set(size["skipped"].values()) if settings.compile else set()
    if settings.peak:
        reasons |= {(row["peak"] or {}).get("reason") for row in size["variants"].values()}
    if minkowski.installed() and minkowski.PACKAGE not in {**size["variants"], **size["skipped"]}:
        return False
    rounds = min(len(row["samples_ms"]) for row in size["variants"].values())
    return rounds >= settings.repeats and not reasons & {NOT_REQUESTED, OUT_OF_TIME}
