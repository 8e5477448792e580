"""The same step against ``torch.compile`` of the masked dense network; slow to start, hence a stage of its own."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from convnextv2_kernels.benchmark.baseline import Baseline
from convnextv2_kernels.benchmark.machine import free_memory
from convnextv2_kernels.benchmark.step import compare
from convnextv2_kernels.benchmark.variants import Variant, make_dense

from .results import Recorder
from .setting import Setting, Skip
from .step import Contest, effort, reported

# (size, images, seconds one compilation takes about), in order of value
PLAN = (("tiny", 256, 75), ("atto", 256, 60), ("base", 256, 120), ("tiny", 64, 75), ("atto", 64, 60), ("base", 64, 120))
BASELINES = (Baseline("channels_last", "linear"), Baseline("nchw", "linear"), Baseline("channels_last", "plain"))


def run(setting: Setting, recorder: Recorder) -> None:
    if setting.dry_run:
        raise Skip("no GPU: torch.compile of the baseline")
    recorder.put(
        about="as the stage step; compile_s: seconds of the first step; graph: the compiled step in a CUDA graph; "
        "reduce-overhead: the compiler's own graphs"
    )
    for size, images, seconds in PLAN:
        contest = None
        for baseline in BASELINES:
            key = f"{size} n{images} {baseline.name} compile"
            if recorder.done("compile", key):
                continue
            if setting.remaining() < seconds:
                recorder.skip(key, f"time: {setting.remaining():.0f} s left, about {seconds} s needed")
                continue
            contest = contest or Contest.make(size, images, setting)
            limit = setting.remaining()
            recorder.case("compile", key, lambda c=contest, b=baseline: _measure(c, b, setting), limit=limit)
            free_memory(setting.device)


def _measure(contest: Contest, baseline: Baseline, setting: Setting) -> dict:
    torch._dynamo.reset()  # variants are instances of one class, each a recompilation
    (compiled,) = make_dense(contest.base, [baseline], "compile")
    start = time.monotonic()
    compiled.step(contest.batch)
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    # the baseline as it is too: its copy is the control
    (plain,) = make_dense(contest.base, [baseline])
    variants = [contest.ours, contest.ours.graphed(), plain, compiled, compiled.graphed(), _own_graphs(compiled)]
    found = compare(variants, contest.batch, effort(setting))
    return {"compile_s": seconds, **reported(found, contest.ours.graphed().name)}


def _own_graphs(compiled: Variant) -> Variant:
    """Compiled again with the mode's own CUDA graphs; the generated kernels are in the cache by then."""
    mode = "reduce-overhead"
    run = torch.compile(compiled.model, fullgraph=True, dynamic=False, mode=mode)
    return replace(compiled, name=f"{compiled.name} {mode}", run=run, compile_mode=mode)
