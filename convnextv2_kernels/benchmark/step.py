"""The FCMAE training step of any set of variants: checked, timed with a control, and weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import allocator, counts, memory
from .baseline import baselines, encoder_sizes
from .correctness import CorrectnessError, check_fcmae, check_loss, step_floor
from .machine import OUT_OF_MEMORY, free_memory, out_of_memory, synchronize
from .peak import arguments_for
from .timing import Budget, Control, summarize, time_interleaved
from .variants import SPARSE, Batch, Settings, Variant, make_batch, make_dense, make_sparse

PEAK_TIMEOUT = 1800.0
MOST_CALLS = 20  # of a step in one sample
# Why something was not measured; it is when it is asked for with more effort.
NOT_REQUESTED, OUT_OF_TIME = "not asked for", "time budget"


def ignore(*_) -> None:
    """A log, or a progress bar, that nobody reads."""


@dataclass(frozen=True)
class Effort:
    """How a comparison is measured.

    Attributes:
        rounds: interleaved rounds, three at least once the budget is spent.
        warmup: steps of each variant before anything counts.
        sample_seconds: a sample is as many steps in a row as fill this, so that waiting for a GPU costs nothing.
        saved: count the bytes saved for backward.
        peak: measure what PyTorch's CUDA allocator holds at most, in this process.
        keep_going: a variant whose loss is wrong, or that cannot be compiled or captured, is skipped, and named;
            otherwise it ends the comparison. One that runs out of memory is always skipped.
        after_round: called when a round is over.
    """

    rounds: int = 10
    budget: Budget = field(default_factory=lambda: Budget(None))
    warmup: int = 2
    sample_seconds: float = 0.0
    saved: bool = True
    peak: bool = False
    keep_going: bool = False
    after_round: Callable[[], object] | None = None


@dataclass
class StepTimes:
    """What was measured of one variant: ``seconds`` of a step by sample; bytes None where they were not asked for."""

    variant: Variant
    seconds: list[float]
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    def to_json(self, images: int) -> dict:
        times = summarize(self.seconds)
        rate = images / (1e-3 * times["median_ms"])
        peak = None if self.peak_bytes is None else {"bytes": self.peak_bytes}
        return {
            **self.variant.described(),
            **times,
            "images_per_s": rate,
            "saved_bytes": self.saved_bytes,
            "peak": peak,
            "parameters_bytes": sum(p.nbytes for p in self.variant.model.parameters()),
        }


@dataclass
class StepComparison:
    """Steps of one batch by variant, those left out with the reason, and the control."""

    images: int
    times: dict[str, StepTimes]
    skipped: dict[str, str]
    control: Control

    def rows(self) -> dict[str, dict]:
        """JSON-ready results by variant."""
        return {name: times.to_json(self.images) for name, times in self.times.items()}

    def to_json(self) -> dict:
        return {"variants": self.rows(), "skipped": self.skipped, "control": self.control.to_json()}

    def fastest(self, wanted: Callable[[Variant], bool]) -> Variant | None:
        """The fastest of the variants that are wanted, None where there is none."""
        found = [times for times in self.times.values() if wanted(times.variant)]
        return min(found, key=lambda times: summarize(times.seconds)["median_ms"]).variant if found else None

    def joined(self, other: StepComparison) -> StepComparison:
        """Both; of a variant that is in both the slower measurement, and the worse control."""
        times = dict(self.times)
        for name, found in other.times.items():
            before = times.get(name)
            if before is None or summarize(found.seconds)["median_ms"] > summarize(before.seconds)["median_ms"]:
                times[name] = found
        control = max(self.control, other.control, key=_off_by)
        return StepComparison(self.images, times, {**self.skipped, **other.skipped}, control)


def _off_by(control: Control) -> float:
    return float("inf") if control.ratio is None else abs(control.ratio - 1)


def compare(
    variants: Sequence[Variant], batch: Batch, effort: Effort, log: Callable[[str], None] = ignore
) -> StepComparison:
    """Warm up, check, weigh and time the variants of one batch in interleaved rounds, with a control among them.

    The first of ours sets the loss that all must have. The control is the fastest eager baseline (of graphs the fastest
    one, replayed; without a baseline the first variant) against a copy of itself with weights of its own.

    Raises:
        CorrectnessError: before anything is timed, where losses differ.
        RuntimeError: memory runs out in the first of ours.
    """
    first = next(variant for variant in variants if variant.ours)
    # Eager: what a graph replays could be wrong on its own.
    expected = replace(first, execution="eager").step(batch).double()
    free_memory(batch.device)
    session = _Session(batch, effort, expected)
    for variant in variants:
        log(f"warming up {variant.name}")
        session.add(variant)
    if first.name not in session.steps:
        reason = session.skipped[first.name]
        raise (torch.OutOfMemoryError if reason == OUT_OF_MEMORY else RuntimeError)(f"{first.name}: {reason}")
    copied = session.add_control()
    names = [name for name in session.steps if name != copied]
    log(f"timing {len(names)} variants, interleaved, beside a control")
    samples = session.time()
    times = {
        name: StepTimes(session.variants[name], samples[name], session.saved.get(name), session.peaks.get(name))
        for name in names
    }
    return StepComparison(len(batch.images), times, session.skipped, session.control(samples, copied))


class _Session:
    """The variants that are ready to be timed."""

    def __init__(self, batch: Batch, effort: Effort, expected: torch.Tensor) -> None:
        self.batch, self.effort, self.expected = batch, effort, expected
        self.variants: dict[str, Variant] = {}
        self.steps: dict[str, Callable[[], torch.Tensor]] = {}
        self.seconds: dict[str, float] = {}
        self.saved: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self.original = ""

    def add(self, variant: Variant) -> None:
        reason = None
        try:
            self._make_ready(variant)
        except Exception as error:
            reason = why_skipped(error)
            caught = self.effort.keep_going and (isinstance(error, CorrectnessError) or variant.execution != "eager")
            if reason != OUT_OF_MEMORY and not caught:
                raise
        if reason is not None:  # not in the handler, where the error's traceback keeps the activations alive
            self.skipped[variant.name] = reason
            self.steps.pop(variant.name, None)
            variant.model.zero_grad(set_to_none=True)
            free_memory(self.batch.device)  # where the GPU is lost, this says so

    def _make_ready(self, variant: Variant) -> None:
        name, batch, effort = variant.name, self.batch, self.effort
        step = variant.prepare(batch)
        check_loss(name, step(), self.expected, step_floor(batch))
        for _ in range(effort.warmup - 1):
            step()
        synchronize(batch.device)
        start = effort.budget.clock()
        step()
        synchronize(batch.device)
        self.seconds[name] = effort.budget.clock() - start
        if effort.saved and variant.execution != "graph":
            self.saved[name] = saved_bytes(variant, batch)
        if effort.peak and batch.device == "cuda" and variant.execution != "graph":
            self.peaks[name] = memory.cuda_peak_bytes(step)
        self.variants[name], self.steps[name] = variant, step

    def add_control(self) -> str | None:
        """Make the copy ready; its name, None where that failed."""
        ready = [self.variants[name] for name in self.steps]
        eager = [v for v in ready if v.dense and v.execution == "eager"]
        graphs = [v for v in ready if v.dense and v.execution == "graph"]
        chosen = min(eager or graphs or ready[:1], key=lambda variant: self.seconds[variant.name])
        self.original, name = chosen.name, f"{chosen.name} copy"
        if chosen.execution == "graph":  # it allocates nothing
            self.steps[name], self.seconds[name] = self.steps[self.original], self.seconds[self.original]
            return name
        lenient = replace(self.effort, keep_going=True, saved=False, peak=False)
        self.effort, effort = lenient, self.effort
        self.add(chosen.copy())
        self.effort = effort
        return name if name in self.steps else None

    def time(self) -> dict[str, list[float]]:
        """Seconds of a step, by variant and sample."""
        effort = self.effort
        calls = {
            name: max(1, min(MOST_CALLS, int(effort.sample_seconds / max(seconds, 1e-9))))
            for name, seconds in self.seconds.items()
            if name in self.steps
        }
        if f"{self.original} copy" in calls:
            calls[f"{self.original} copy"] = calls[self.original]
        runs = {name: self._repeated(step, calls[name]) for name, step in self.steps.items()}
        samples = time_interleaved(runs, effort.rounds, effort.budget.deadline, effort.budget.clock, effort.after_round)
        return {name: [seconds / calls[name] for seconds in found] for name, found in samples.items()}

    def _repeated(self, step: Callable[[], object], times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                step()
            synchronize(self.batch.device)

        return run

    def control(self, samples: Mapping[str, Sequence[float]], copied: str | None) -> Control:
        if copied is None:
            return Control(self.original, None, self.skipped.pop(f"{self.original} copy"))
        return Control.from_samples(self.original, samples[self.original], samples[copied])


def compare_graphs(
    ours: Sequence[Variant], dense: Sequence[Variant], batch: Batch, effort: Effort, log: Callable[[str], None] = ignore
) -> StepComparison | None:
    """Our steps in CUDA graphs against each dense one in a graph, one after the other: their memory lives side by side.

    Of the times of our steps, one beside each dense step, the longest counts. None without a dense variant.
    """
    effort = replace(effort, saved=False, peak=False, keep_going=True)
    found = None
    for variant in dense:
        pair = compare([*(v.graphed() for v in ours), variant.graphed()], batch, effort, log)
        found = pair if found is None else found.joined(pair)
        free_memory(batch.device)
    return found


def why_skipped(error: BaseException) -> str:
    """ "out of memory", or the kind of an error and its first line."""
    if isinstance(error, Exception) and out_of_memory(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def saved_bytes(variant: Variant, batch: Batch) -> int:
    """Bytes saved for backward by a variant's step."""
    alive = [*variant.model.parameters(), *variant.model.buffers(), batch.images, batch.mask]
    total = memory.saved_bytes(lambda: variant.forward(batch)[0], alive)
    variant.model.zero_grad(set_to_none=True)
    return total


def compiled_variants(
    sparse: Variant, chosen: Sequence, batch: Batch, budget: Budget, log: Callable[[str], None]
) -> tuple[list[Variant], dict[str, str]]:
    """Baselines compiled and warm, and why others were skipped: half of the budget spent, out of memory, or the
    compiler failed."""
    # The variants are instances of one class, each a recompilation to the compiler; a fresh start
    # for each model keeps their number within its limit.
    torch._dynamo.reset()
    variants, skipped = [], {}
    compiling = budget.part(0.5)
    for baseline in chosen:
        name = f"{baseline.name} compile"
        if compiling.spent:
            skipped[name] = OUT_OF_TIME
            continue
        log(f"compiling {name}")
        (variant,) = make_dense(sparse, [baseline], "compile")
        try:
            variant.step(batch)
        except Exception as error:  # of the compiler, in classes that differ between versions of PyTorch
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            skipped[name] = OUT_OF_MEMORY if out_of_memory(error) else f"cannot be compiled: {first}"
        if name not in skipped:
            variants.append(variant)
            continue
        variant.model.zero_grad(set_to_none=True)
        free_memory(batch.device)
    return variants, skipped


@dataclass(frozen=True)
class StepSettings(Settings):
    """What ``bench`` measures without a mode."""

    models: tuple[str, ...] = ("convnextv2_atto", "convnextv2_tiny")
    compile: bool = True


def measure_step(model_name: str, settings: StepSettings, budget: Budget, log: Callable[[str], None]) -> dict:
    """Check, then time and weigh the training step of one model by every variant.

    Returns JSON-ready results. Raises CorrectnessError, before anything is timed, when variants disagree.
    """
    batch = settings.make_batch()
    sparse = make_sparse(model_name, settings.seed, settings.device)
    eager = make_dense(sparse, baselines())
    log(f"{model_name}: comparing losses and gradients with float64")
    correctness = check_fcmae(sparse, eager, batch)
    compiled, skipped = [], {}
    if settings.compile:
        compiled, skipped = compiled_variants(sparse, baselines(), batch, budget, log)
    effort = Effort(settings.repeats, budget)
    comparison = compare([sparse, *eager, *compiled], batch, effort, lambda text: log(f"{model_name}: {text}"))
    if settings.device == "cuda":
        comparison = with_graphs(comparison, sparse, (is_eager, is_compiled), batch, effort)
    rows = comparison.rows()
    for group in (sparse_only, is_eager, is_compiled):
        fastest = comparison.fastest(group)
        if fastest is not None and not budget.spent:
            log(f"{model_name}: peak memory of {fastest.name}")
            rows[fastest.name]["peak"] = peak_of_process(fastest, model_name, settings)
    ours = fastest_of(rows, is_ours)
    return {
        "model": model_name,
        "correctness": correctness,
        "ours": ours,
        **comparison.to_json(),
        "variants": rows,
        "skipped": {**skipped, **comparison.skipped},
        "flops": flops_of(sparse, batch),
        "ratios": ratios(rows, ours),
    }


def sparse_only(variant: Variant) -> bool:
    return variant.ours and variant.execution == "eager"


def is_eager(variant: Variant) -> bool:
    return variant.dense and variant.execution == "eager"


def is_compiled(variant: Variant) -> bool:
    return variant.dense and variant.execution == "compile"


def with_graphs(
    comparison: StepComparison, ours: Variant, groups: Sequence[Callable[[Variant], bool]], batch: Batch, effort: Effort
) -> StepComparison:
    """The comparison, and ours in a CUDA graph beside graphs of the fastest variant of each group."""
    fastest = [comparison.fastest(group) for group in groups]
    try:
        graphs = compare_graphs([ours], [variant for variant in fastest if variant is not None], batch, effort)
    except RuntimeError as error:  # ours could not be captured, or there is no memory for it beside the others
        comparison.skipped[ours.graphed().name] = why_skipped(error)
        graphs = None
    free_memory(batch.device)  # where the GPU is lost, this says so
    return comparison if graphs is None else comparison.joined(graphs)


def peak_of_process(variant: Variant, model_name: str, settings: Settings) -> dict:
    """Peak memory of an eager or compiled step in a process of its own, whose allocator is as it is by default."""
    arguments = arguments_for(variant, model_name, settings, torch.get_num_threads())
    return memory.peak_in_subprocess(arguments, PEAK_TIMEOUT)


def flops_of(sparse: Variant, batch: Batch) -> dict[str, float]:
    """Counted minimum of a step over visible sites, and over all sites."""
    depths, dims = encoder_sizes(sparse.model.state_dict())
    return {
        "sparse": counts.fcmae_step(batch.mask, depths, dims),
        "dense": counts.fcmae_step(batch.mask, depths, dims, dense=True),
    }


def is_ours(row: Mapping[str, Any]) -> bool:
    """Whether a row of the results is of this library, and not masked dense or another engine's."""
    return row["baseline"] is None and row.get("engine") is None


def peak_of(row: dict) -> int | None:
    """Peak bytes of a step, None where they were not measured."""
    return (row["peak"] or {}).get("bytes")


def fastest_of(rows: Mapping[str, dict], wanted: Callable[[dict], bool]) -> str | None:
    """Name of the fastest row that is wanted, None where there is none."""
    found = [name for name, row in rows.items() if wanted(row)]
    return min(found, key=lambda name: rows[name]["median_ms"], default=None)


def ratios(rows: Mapping[str, dict], ours: str) -> dict:
    """Our variant against the fastest dense one, and the most frugal ones; and like with like by execution.

    Empty without a dense variant. ``throughput``: the fastest of all; ``throughput_eager``, ``throughput_graph``: the
    fastest on both sides, each executed so; ``saved`` and ``peak``: the least of all dense variants over ours.
    """
    dense = {name: row for name, row in rows.items() if row["baseline"] is not None}
    if not dense:
        return {}
    backend = rows[ours].get("backend")
    mine = {n: row for n, row in rows.items() if is_ours(row) and row.get("backend") == backend}
    mine = {n: row for n, row in mine.items() if row.get("maps") == rows[ours].get("maps")}
    fastest = fastest_of(dense, lambda row: True)
    found = {"fastest_dense": fastest, "throughput": dense[fastest]["median_ms"] / rows[ours]["median_ms"]}
    for execution in ("eager", "graph"):
        theirs, own = (fastest_of(side, lambda row, e=execution: row["execution"] == e) for side in (dense, mine))
        if theirs and own:
            found[f"fastest_{execution}"] = theirs
            found[f"throughput_{execution}"] = dense[theirs]["median_ms"] / rows[own]["median_ms"]
    weighed = next((row for row in mine.values() if row["saved_bytes"] is not None), None)
    heavy = {name: row for name, row in dense.items() if row["saved_bytes"] is not None}
    if weighed and heavy:
        frugal = min(heavy, key=lambda name: heavy[name]["saved_bytes"])
        found |= {"frugal_dense": frugal, "saved": heavy[frugal]["saved_bytes"] / weighed["saved_bytes"]}
    return found | _peak_ratios(dense, mine)


def _peak_ratios(dense: Mapping[str, dict], mine: Mapping[str, dict]) -> dict:
    """Only where the peak of every eager and compiled step is known."""
    sides = [{n: row for n, row in side.items() if row["execution"] != "graph"} for side in (dense, mine)]
    if not all(side and all(peak_of(row) for row in side.values()) for side in sides):
        return {}
    theirs, own = (min(side, key=lambda name: peak_of(side[name])) for side in sides)
    heavy, light = sides[0][theirs], sides[1][own]
    found = {"least_peak_dense": theirs, "peak": peak_of(heavy) / peak_of(light)}
    if heavy.get("parameters_bytes"):
        totals = [peak_of(row) + row["parameters_bytes"] for row in (heavy, light)]
        found["peak_with_parameters"] = totals[0] / totals[1]
    return found


def compare_fcmae_step(model_name: str, batch_size: int, img_size: int = 224, repeats: int = 3) -> dict:
    """A quick comparison of one FCMAE training step in float32, without compiled variants.

    The C library's allocator is held constant, for as long as the process lives.

    Args:
        model_name: such as ``convnextv2_atto``.
        batch_size: images per step.
        img_size: side of the images in pixels, a multiple of 32.
        repeats: timed rounds; each runs the sparse step and four dense variants once.

    Returns:
        ``sparse_ms``, ``dense_ms``: medians, of the fastest dense variant, ``dense_variant``;
        ``time_ratio``, dense over sparse; ``sparse_bytes``, ``dense_bytes``: saved for backward, of
        the same dense variant; ``bytes_ratio``; ``control``: of :class:`.timing.Control`.

    Raises:
        CorrectnessError: the sparse loss or a gradient disagrees with float64.
    """
    allocator.hold("constant")
    batch = make_batch(batch_size, img_size, seed=0)
    sparse = make_sparse(model_name, seed=0)
    dense = make_dense(sparse, baselines(("linear", "conv1x1")))
    check_fcmae(sparse, dense, batch, images=1)
    comparison = compare([sparse, *dense], batch, Effort(repeats))
    rows = comparison.rows()
    best = comparison.fastest(is_eager)
    ours, theirs = rows[SPARSE], rows[best.name]
    return {
        "sparse_ms": ours["median_ms"],
        "dense_ms": theirs["median_ms"],
        "dense_variant": best.name.removeprefix("dense "),
        "time_ratio": theirs["median_ms"] / ours["median_ms"],
        "sparse_bytes": ours["saved_bytes"],
        "dense_bytes": theirs["saved_bytes"],
        "bytes_ratio": theirs["saved_bytes"] / ours["saved_bytes"],
        "control": comparison.control.to_json(),
    }
