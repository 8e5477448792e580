"""The same step against ``torch.compile`` of the masked dense network; slow to start, hence a stage of its own."""

from __future__ import annotations

import time

import torch
from .results import Recorder, context_lost
from .setting import Setting, Skip, first_line
from .step_arms import Contest, DeviceArm, Step
from .step_timing import ratios, time_steps

from convnextv2_kernels.benchmark.baseline import Variant
from convnextv2_kernels.benchmark.device import free_memory

ROUNDS = 7
# (size, images, seconds one compilation takes about), in order of value
PLAN = (("tiny", 256, 75), ("atto", 256, 60), ("base", 256, 120), ("tiny", 64, 75), ("atto", 64, 60), ("base", 64, 120))
VARIANTS = (
    Variant("channels_last", "linear", True),
    Variant("nchw", "linear", True),
    Variant("channels_last", "plain", True),
)


def run(setting: Setting, recorder: Recorder) -> None:
    if setting.dry_run:
        raise Skip("no GPU: torch.compile of the baseline")
    recorder.put(
        about="as the stage step; compile_s: seconds of the first step; graph: the compiled step in a CUDA graph"
    )
    for size, images, seconds in PLAN:
        contest = None
        for variant in VARIANTS:
            key = f"{size} n{images} {variant.name}"
            if recorder.done("compile", key):
                continue
            if setting.remaining() < seconds:
                recorder.skip(key, f"time: {setting.remaining():.0f} s left, about {seconds} s needed")
                continue
            contest = contest or Contest(size, images, setting)
            limit = setting.remaining()
            recorder.case("compile", key, lambda c=contest, v=variant: _measure(c, v, setting), limit=limit)
            free_memory(setting.device)


def _measure(contest: Contest, variant: Variant, setting: Setting) -> dict:
    torch._dynamo.reset()  # variants are instances of one class, each a recompilation
    arm = contest.dense(variant)
    start = time.monotonic()
    compiled = contest.eager(arm)
    compiled.run()
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    steps, notes = [contest.eager(), contest.graphed(), compiled], {}
    for name, make in (("graph", contest.graphed), ("reduce-overhead", _reduced_overhead(contest))):
        try:
            steps.append(make(arm))
        except Exception as error:
            if context_lost(error):
                raise
            notes[name] = first_line(error)
            free_memory(setting.device)
    rows = time_steps(contest, steps, setting, ROUNDS, memory=False)
    return {"compile_s": seconds, "not_run": notes, "steps": rows, **ratios(rows, "ours graph")}


def _reduced_overhead(contest: Contest):
    """Compiles again with the mode's own CUDA graphs; the generated kernels are in the cache by then."""

    def make(arm: DeviceArm) -> Step:
        model = torch.compile(arm.model, fullgraph=True, dynamic=False, mode="reduce-overhead")
        other = DeviceArm(f"{arm.name} reduce-overhead", arm.model, model, arm.variant)
        step = contest.eager(other)

        def run():
            torch.compiler.cudagraph_mark_step_begin()
            # a copy: the loss lives in memory that the next step writes
            return step.run().clone()

        for _ in range(3):  # compilation, warm-up and recording
            run()
        return Step(other.name, run, arm.model)

    return make
