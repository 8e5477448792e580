"""FCMAE training step, bf16 autocast: ours against masked dense PyTorch, eager and in CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convnextv2_kernels.benchmark.baseline import MEMORY_FORMATS, baselines
from convnextv2_kernels.benchmark.correctness import check_variants, results_of
from convnextv2_kernels.benchmark.machine import automatic_backend, free_memory, unsupported_reason
from convnextv2_kernels.benchmark.step import Effort, StepComparison, compare, compare_graphs, ratios
from convnextv2_kernels.benchmark.timing import Budget
from convnextv2_kernels.benchmark.variants import Batch, Variant, make_batch, make_dense, make_sparse, run_by

from .results import Recorder
from .setting import Setting, Skip
from .triton_setup import compile_ahead

AMP = torch.bfloat16
CHECKED_IMAGES = 2
# (size, images, seconds it takes about), in order of value
PLAN = (
    ("tiny", 256, 20),
    ("atto", 256, 12),
    ("base", 256, 40),
    ("tiny", 64, 12),
    ("atto", 64, 10),
    ("base", 64, 30),
    ("huge", 64, 90),
)
DRY_PLAN = (("atto", 1, 1),)
ROUNDS = 7
SAMPLE_SECONDS = 0.03  # a sample is as many steps in a row as fill this, so that the wait at its end costs nothing
# where ours is also timed by other backends, and the seconds that takes about, most of them Triton's compilations
BY_BACKEND = {("tiny", 256): 35}
BACKENDS = ("triton", "auto")


@dataclass
class Contest:
    """One size on one batch: ours by the setting's backend, and the baselines, all with the same weights."""

    batch: Batch
    ours: Variant
    base: Variant

    @classmethod
    def make(cls, size: str, images: int, setting: Setting) -> Contest:
        torch.backends.cudnn.benchmark = True  # the dense network at its best
        batch = make_batch(images, 64 if setting.dry_run else 224, 0, AMP, setting.device)
        base = make_sparse(f"convnextv2_{size}", 0, setting.device)
        return cls(batch, run_by(base, setting.backend), base)

    def dense(self) -> list[Variant]:
        """Every baseline, those with the usual pointwise layers also with PyTorch's own convolutions."""
        found = make_dense(self.base, baselines())
        return found + [variant.native() for variant in found if variant.baseline.pointwise == "linear"]


def effort(setting: Setting, **more) -> Effort:
    """What a stage may spend on one comparison."""
    if setting.dry_run:
        return Effort(1, warmup=1, keep_going=True, saved=False, **more)
    budget = Budget(max(0.0, setting.remaining() - 5), time.perf_counter)
    return Effort(ROUNDS, budget, 2, SAMPLE_SECONDS, saved=False, keep_going=True, **more)


def run(setting: Setting, recorder: Recorder) -> None:
    recorder.put(
        about="forward and backward, no optimizer, 224 px, mask ratio 0.6, bf16 autocast; ms per step, interleaved "
        "rounds, with a baseline against its own copy as the control; peak: bytes beyond what lives before the step; "
        "dense: every hidden site computed, then masked; ratios are of ours with float32 maps, the residual stream "
        "that autocast keeps on the dense side too"
    )
    for size, images, seconds in DRY_PLAN if setting.dry_run else PLAN:
        _compare(size, images, seconds, setting, recorder)
        free_memory(setting.device)


def _compare(size: str, images: int, seconds: float, setting: Setting, recorder: Recorder) -> None:
    key = f"{size} n{images}"
    groups = ("check", "eager", "graph", *(["backends"] if (size, images) in BY_BACKEND else []))
    if all(recorder.done(group, f"{key} {group}") for group in groups):
        return
    if setting.remaining() < seconds:
        recorder.skip(key, f"time: {setting.remaining():.0f} s left, about {seconds:.0f} s needed")
        return
    contest = Contest.make(size, images, setting)
    ours, dense = contest.ours, contest.dense()
    limit = setting.remaining()

    def check() -> dict:
        return check_variants([ours], dense[1:2], contest.batch, CHECKED_IMAGES)[ours.name]

    recorder.case("check", f"{key} check", check, limit=limit)

    def eager() -> dict:
        variants = [ours, ours.with_maps(AMP), *dense]
        return reported(compare(variants, contest.batch, effort(setting, peak=True)), ours.name)

    rows = recorder.case("eager", f"{key} eager", eager, limit=limit)
    free_memory(setting.device)

    def graph() -> dict:
        if setting.dry_run:
            raise Skip("no GPU: CUDA graphs")
        found = compare_graphs([ours, ours.with_maps(AMP)], _fastest(dense, rows), contest.batch, effort(setting))
        return reported(found, ours.graphed().name)

    recorder.case("graph", f"{key} graph", graph, limit=limit)
    _compare_targets(recorder, key)
    if (size, images) in BY_BACKEND and not setting.dry_run:
        free_memory(setting.device)
        _by_backend(contest, key, dense[1:2], setting, recorder)


def reported(comparison: StepComparison, ours: str) -> dict:
    """What the JSON keeps: no samples, and the ratios."""
    rows = comparison.rows()
    found = {**comparison.to_json(), "ours": ours, "ratios": ratios(rows, ours)}
    for row in found["variants"].values():
        del row["samples_ms"]
    return found


def _fastest(dense: Sequence[Variant], rows: dict | None) -> list[Variant]:
    """Of each memory format the fastest that was timed, or the one with the usual pointwise layers."""
    times = {name: row["median_ms"] for name, row in (rows or {"variants": {}})["variants"].items()}
    found = []
    for layout in MEMORY_FORMATS:
        of_layout = [variant for variant in dense if variant.baseline.layout == layout]
        usual = next(variant for variant in of_layout if variant.baseline.pointwise == "linear")
        timed = [variant for variant in of_layout if variant.name in times]
        found.append(min(timed, key=lambda variant: times[variant.name], default=usual))
    return found


def _by_backend(contest: Contest, key: str, dense: list[Variant], setting: Setting, recorder: Recorder) -> None:
    """Ours by the setting's backend, by Triton and by what ``auto`` takes: checked against ``dense``, and timed."""
    seconds, limit = BY_BACKEND[key_of(key)], setting.remaining()
    if limit < seconds:
        recorder.skip(f"{key} backends", f"time: {limit:.0f} s left, about {seconds} s needed")
        return
    others = []
    for name in BACKENDS:
        reason = None if name == "auto" else unsupported_reason(name, setting.device, AMP)
        if reason is None:
            others.append(run_by(contest.base, name))
        else:
            recorder.skip(f"{key} by {name}", reason)
    few = contest.batch.head(CHECKED_IMAGES)
    runs = [lambda v=v: results_of(v, few) for v in others]
    runs += [lambda v=v: v.step(contest.batch) for v in others]
    recorder.case("compiled", f"{key} by other backends", lambda: compile_ahead(runs), limit=limit)
    free_memory(setting.device)
    for other in others:

        def check(other: Variant = other) -> dict:
            return check_variants([other], dense, contest.batch, CHECKED_IMAGES)[other.name]

        recorder.case("check", f"{key} by {other.backend} check", check, limit=limit)

    def times() -> dict:
        return against_backends(contest, others, setting)

    recorder.case("backends", f"{key} backends", times, needs=10, limit=limit)


def key_of(key: str) -> tuple[str, int]:
    """Size and images of a case's name."""
    size, images = key.split()
    return size, int(images[1:])


def against_backends(contest: Contest, others: Sequence[Variant], setting: Setting) -> dict:
    """Our step by each backend in interleaved rounds, eager and then in graphs; each row says what ran it."""
    variants = [contest.ours, *others]
    found = compare(variants, contest.batch, effort(setting, peak=True))
    if not setting.dry_run:
        free_memory(setting.device)
        graphs = compare([v.graphed() for v in variants], contest.batch, effort(setting))
        found = found.joined(graphs)
    rows = reported(found, contest.ours.name)
    for row in rows["variants"].values():
        row["run_by"] = running(row["backend"], setting.device)
    return rows


def running(backend: str, device: str) -> str:
    """What runs a block: the backend asked for, or what ``auto`` takes."""
    return backend if backend != "auto" else automatic_backend(device, AMP)


def _compare_targets(recorder: Recorder, key: str) -> None:
    """Our graph against the fastest dense eager step as well, which is the comparison users see."""
    eager = recorder.result.get("eager", {}).get(f"{key} eager")
    graph = recorder.result.get("graph", {}).get(f"{key} graph")
    if eager and graph and eager["ratios"] and graph["ours"] in graph["variants"]:
        best = eager["variants"][eager["ratios"]["fastest_dense"]]["median_ms"]
        ratio = best / graph["variants"][graph["ours"]]["median_ms"]
        recorder.put(dense_eager_over_ours_graph={**recorder.result.get("dense_eager_over_ours_graph", {}), key: ratio})
