"""Where the GPU time of our step goes, by kernel, and which share of the step the GPU is busy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch

from convnextv2_kernels.benchmark.variants import Variant

from .results import Recorder
from .setting import Setting, Skip
from .step import Contest

STEPS, TOP = 3, 25
# kernels of this library live in its C++ namespace
KINDS = (
    ("own kernels", r"cnx::"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|splitK"),
    ("copies, fills", r"Mem(cpy|set)"),
)


def kind(name: str) -> str:
    """Which part of the step a kernel belongs to."""
    return next((label for label, pattern in KINDS if re.search(pattern, name)), "other PyTorch kernels")


def record(step: Callable[[], object], device: str, steps: int = STEPS) -> list[tuple[str, float, float]]:
    """``(name, start, end)`` in microseconds of every kernel of a few steps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == wanted]
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


def busy_share(intervals: list[tuple[float, float]]) -> float:
    """Covered part of the time between the first start and the last end."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / (reached - min(start for start, _ in intervals))


def summarize(kernels: list[tuple[str, float, float]], steps: int = STEPS) -> tuple[dict, str]:
    """Numbers for the JSON, and a table of the kernels that take most."""
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    time, calls, kinds = defaultdict(float), defaultdict(int), defaultdict(float)
    for name, start, end in kernels:
        time[name] += (end - start) / steps
        calls[name] += 1
        kinds[kind(name)] += 1e-3 * (end - start) / steps
    total = sum(time.values())
    lines = [f"{'us/step':>10} {'share':>6} {'calls':>6} {'us/call':>8}  kernel"]
    for name in sorted(time, key=time.get, reverse=True)[:TOP]:
        each = time[name] * steps / calls[name]
        lines.append(
            f"{time[name]:10.1f} {time[name] / total:6.1%} {calls[name] / steps:6.1f} {each:8.1f}  {name[:150]}"
        )
    numbers = {
        "kernel_ms_per_step": 1e-3 * total,
        "kernels_per_step": len(kernels) / steps,
        "gpu_busy_share": busy_share([(start, end) for _, start, end in kernels]),
        "ms_per_step_by_kind": dict(kinds),
    }
    return numbers, "\n".join(lines) + "\n"


def run(setting: Setting, recorder: Recorder) -> None:
    size, images = ("atto", 1) if setting.dry_run else ("tiny", 256)
    steps = 1 if setting.dry_run else STEPS
    contest = Contest.make(size, images, setting)
    path = setting.folder / f"profile_{size}_{images}.txt"
    tables = []

    def case(name: str, variant: Variant) -> None:
        def measure() -> dict:
            if setting.dry_run and variant.execution == "graph":
                raise Skip("no GPU: CUDA graphs")
            numbers, table = summarize(record(variant.prepare(contest.batch), setting.device, steps), steps)
            tables.append(f"{name}, FCMAE {size}, batch {images}, {steps} steps: {numbers}\n{table}\n")
            path.write_text("\n".join(tables))
            return numbers

        recorder.case("steps", f"{size} n{images} {name}", measure, limit=setting.remaining() + 5)

    if setting.remaining() < 5:
        raise Skip("time: the model was not made in time")
    case("ours eager", contest.ours)
    case("ours graph", contest.ours.graphed())
