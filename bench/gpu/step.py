"""FCMAE training step, bf16 autocast: ours against masked dense PyTorch, eager and in CUDA graphs."""

from __future__ import annotations

import copy
from dataclasses import replace

from .results import Recorder, context_lost
from .setting import Setting, Skip, first_line
from .step_arms import AMP, GATE_IMAGES, Contest, Step
from .step_timing import fastest, ratios, time_steps
from .triton_setup import compile_ahead

from convnextv2_kernels import backends
from convnextv2_kernels.benchmark.baseline import MEMORY_FORMATS, eager_variants
from convnextv2_kernels.benchmark.correctness import results_of
from convnextv2_kernels.benchmark.device import free_memory

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
# where ours is also timed by other backends, and the seconds that takes about, most of them Triton's compilations
BY_BACKEND = {("tiny", 256): 35}
BACKENDS = ("triton", "auto")


def run(setting: Setting, recorder: Recorder) -> None:
    recorder.put(
        about="forward and backward, no optimizer, 224 px, mask ratio 0.6, bf16 autocast; ms per step, interleaved "
        "rounds; peak_step: beyond what lives before the step; dense: every hidden site computed, then masked; ratios "
        "are of ours with float32 maps, the residual stream that autocast keeps on the dense side too"
    )
    for size, images, seconds in DRY_PLAN if setting.dry_run else PLAN:
        _contest(size, images, seconds, setting, recorder)
        free_memory(setting.device)


def _contest(size: str, images: int, seconds: float, setting: Setting, recorder: Recorder) -> None:
    key = f"{size} n{images}"
    groups = ("gate", "eager", "graph", *(["backends"] if (size, images) in BY_BACKEND else []))
    if all(recorder.done(group, f"{key} {group}") for group in groups):
        return
    if setting.remaining() < seconds:
        recorder.skip(key, f"time: {setting.remaining():.0f} s left, about {seconds:.0f} s needed")
        return
    contest = Contest(size, images, setting)
    arms = [contest.dense(variant) for variant in eager_variants()]
    arms += [arm.native() for arm in arms if arm.variant.pointwise == "linear"]
    limit = setting.remaining()
    recorder.case("gate", f"{key} gate", lambda: contest.check(arms[1:2]), limit=limit)

    def eager() -> dict:
        ours = [contest.eager(), contest.eager(maps=AMP)]
        rows = time_steps(contest, [*ours, *map(contest.eager, arms)], setting, ROUNDS, memory=True)
        return {"steps": rows, **ratios(rows, "ours eager")}

    rows = recorder.case("eager", f"{key} eager", eager, limit=limit)
    free_memory(setting.device)

    def graph() -> dict:
        if setting.dry_run:
            raise Skip("no GPU: CUDA graphs")
        steps = (rows or {}).get("steps", {})
        chosen = [fastest(steps, f"dense {layout}") or f"dense {layout} linear eager" for layout in MEMORY_FORMATS]
        return against_graphs(contest, [arm for arm in arms if arm.name in chosen], setting)

    recorder.case("graph", f"{key} graph", graph, limit=limit)
    _compare_targets(recorder, key)
    if (size, images) in BY_BACKEND and not setting.dry_run:
        free_memory(setting.device)
        _by_backend(contest, key, arms[1:2], recorder)


def _by_backend(contest: Contest, key: str, dense: list, recorder: Recorder) -> None:
    """Ours by the setting's backend, by Triton alone and by what ``auto`` takes: gates against ``dense``, and times."""
    setting = contest.setting
    seconds, limit = BY_BACKEND[contest.size, contest.images], setting.remaining()
    if limit < seconds:
        recorder.skip(f"{key} backends", f"time: {limit:.0f} s left, about {seconds} s needed")
        return
    others = {}
    for name in BACKENDS:
        reason = None if name == "auto" else backends.why_not(name, setting.device, AMP)
        if reason is None:
            others[name] = served_by(contest, name)
        else:
            recorder.skip(f"{key} by {name}", reason)
    few = contest.batch.head(GATE_IMAGES)
    runs = [lambda c=c: results_of(c.sparse, few) for c in others.values()]
    runs += [lambda c=c: c.eager().run() for c in others.values()]
    recorder.case("compiled", f"{key} by other backends", lambda: compile_ahead(runs), limit=limit)
    free_memory(setting.device)
    for name, other in others.items():
        recorder.case("gate", f"{key} by {name} gate", lambda c=other: c.check(dense), limit=limit)
    recorder.case("backends", f"{key} backends", lambda: against_backends(contest, others), needs=10, limit=limit)


def against_backends(contest: Contest, others: dict[str, Contest]) -> dict:
    """Our step by each backend in interleaved rounds, eager and then in graphs; each row says what served."""
    rows: dict[str, dict] = {}
    for how in ("eager", "graphed"):
        if how == "graphed" and contest.setting.dry_run:
            continue
        steps = [getattr(contest, how)(), *(named(getattr(c, how)(), name) for name, c in others.items())]
        rows |= time_steps(contest, steps, contest.setting, ROUNDS, memory=how == "eager")
        free_memory(contest.setting.device)
    for name, row in rows.items():
        row["backend"] = serving(name.partition(" by ")[2] or contest.setting.backend, contest.setting.device)
    return {"steps": rows}


def served_by(contest: Contest, backend: str) -> Contest:
    """The same model and batch, ours by another backend."""
    other = copy.copy(contest)
    other.setting = replace(contest.setting, backend=backend)
    other.sparse = replace(contest.sparse, run=other._run_sparse)
    return other


def named(step: Step, backend: str) -> Step:
    return replace(step, name=f"{step.name} by {backend}")


def serving(backend: str, device: str) -> str:
    """What serves a block: the backend asked for, or what ``auto`` takes."""
    return backend if backend != "auto" else backends.automatic("convnextv2_block", device, (AMP,))


def against_graphs(contest: Contest, arms: list, setting: Setting) -> dict:
    """Our step in a graph against each dense one in a graph, one after the other: their memory lives side by side.

    Of the times of our step, one beside each dense step, the longest counts."""
    ours = [contest.graphed(), contest.graphed(maps=AMP)]
    rows: dict[str, dict] = {}
    for arm in arms:
        pair = time_steps(contest, [*ours, *_graphed(contest, arm, rows)], setting, ROUNDS, memory=False)
        for name, row in pair.items():
            slower = row.get("ms_median", 0) > rows.get(name, {}).get("ms_median", 0)
            if name not in rows or slower:
                rows[name] = row
        free_memory(setting.device)
    return {"steps": rows, **ratios(rows, "ours graph")}


def _graphed(contest: Contest, arm, rows: dict[str, dict]) -> list:
    try:
        return [contest.graphed(arm)]
    except Exception as error:  # out of memory, or not to be captured: the other layout may do
        if context_lost(error):
            raise
        rows[f"{arm.name} graph"] = {"error": first_line(error)}
        free_memory(contest.setting.device)
        return []


def _compare_targets(recorder: Recorder, key: str) -> None:
    """Our graph against the fastest dense eager step as well, which is the comparison users see."""
    eager = recorder.result.get("eager", {}).get(f"{key} eager", {}).get("steps", {})
    graph = recorder.result.get("graph", {}).get(f"{key} graph", {}).get("steps", {})
    best = fastest(eager, "dense")
    if best and "ms_median" in graph.get("ours graph", {}):
        ratio = eager[best]["ms_median"] / graph["ours graph"]["ms_median"]
        recorder.put(dense_eager_over_ours_graph={**recorder.result.get("dense_eager_over_ours_graph", {}), key: ratio})
