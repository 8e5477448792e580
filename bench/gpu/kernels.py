"""Every CUDA operator by itself, on the shapes of the models: microseconds, and the share of copy bandwidth."""

from __future__ import annotations

import torch

from convnextv2_kernels.benchmark.machine import free_memory

from .cases import DRY_STAGES, SHARE_FROM_US, Case, stage_shapes
from .ceilings import GIB, copy_tbps
from .conv_cases import dense_cases, packed_cases
from .operators import Draw, namespace
from .parameter_cases import parameter_cases
from .results import Recorder
from .row_cases import copy_cases, mlp_cases, norm_cases
from .setting import Setting
from .timing import Timer, cold_sets, median, trim_memory, warm_calls

PLAN = (("tiny", 256), ("tiny", 64), ("atto", 256), ("atto", 64))


def all_cases(ops, dry_run: bool, itemsize: int = 2) -> list[Case]:
    """Cases in order of value."""
    batches = [DRY_STAGES] if dry_run else [stage_shapes(*item) for item in PLAN]
    cases: list[Case] = []
    for stages in batches:
        for family in (packed_cases, mlp_cases, norm_cases, parameter_cases):
            cases += [case for shape in stages for case in family(ops, shape, itemsize)]
        cases += copy_cases(ops, stages[0], itemsize)
        if stages is batches[0] or stages[0].images == 64:
            cases += dense_cases(ops, stages[0], itemsize)
    return cases


def judge(case: Case, cold: float, warm: float, copy_tbps: float) -> dict:
    """One row of results, from seconds per call."""
    least = 1e-12 * case.bytes / copy_tbps
    row = {
        "cold_us": 1e6 * cold,
        "warm_us": 1e6 * warm,
        "MB": 1e-6 * case.bytes,
        "copy_share_cold": least / cold,
        "copy_share_warm": least / warm,
    }
    if case.target is not None and 1e6 * least >= SHARE_FROM_US:
        row["target"] = case.target
        row["met"] = row["copy_share_cold"] >= case.target
    return row


def measure(case: Case, draw: Draw, timer: Timer, copy_tbps: float, dry_run: bool) -> dict:
    """Times one case with buffers rotated past the cache, and on one set of buffers."""
    torch.manual_seed(0)
    calls = case.make(draw, cold_sets(case.bytes, dry_run))
    cold = median(timer.calls(calls, keep=True))
    warm = median(timer.calls(calls[:1] * warm_calls(cold, dry_run)))
    return judge(case, cold, warm, copy_tbps)


def run(setting: Setting, recorder: Recorder) -> None:
    torch.backends.cudnn.benchmark = True  # the peers at their best
    timer = Timer(setting.device, 1 if setting.dry_run else 9)
    # measured in this process: the share is of what this GPU copies now
    copy = recorder.case("bandwidth", "copy_TBps", lambda: copy_tbps(timer, 1 << 16 if setting.dry_run else GIB, 4))
    if copy is None:
        raise RuntimeError("the copy bandwidth could not be measured")
    free_memory(setting.device)
    recorder.put(
        about="us per call, medians. cold: buffers rotated past 200 MB; warm: one set of buffers. MB: least traffic. "
        "copy_share: least time at copy bandwidth / time. bf16; 'float32' at the end of a name: float32"
    )
    ops, draw = namespace(setting), Draw(setting.device, torch.bfloat16)
    cases = [(case, draw) for case in all_cases(ops, setting.dry_run)]
    if not setting.dry_run:
        wide = Draw(setting.device, torch.float32)
        shapes = stage_shapes(*PLAN[0])
        cases += [(_renamed(case), wide) for shape in shapes for case in packed_cases(ops, shape, 4)]
    for case, source in cases:
        recorder.case(
            "kernels", case.key, lambda c=case, d=source: measure(c, d, timer, copy, setting.dry_run), limit=30
        )
        trim_memory(setting.device)


def _renamed(case: Case) -> Case:
    return Case(f"{case.key} float32", case.bytes, case.make)
