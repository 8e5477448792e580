"""Interleaved times of training steps, and their peak memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from .setting import Setting, first_line
from .step_arms import Contest, Step
from .timing import Timer, spread

from convnextv2_kernels.benchmark.correctness import GateError
from convnextv2_kernels.benchmark.device import free_memory
from convnextv2_kernels.benchmark.timing import time_interleaved

WARM_UP = 2
SAMPLE_SECONDS = 0.03  # a sample is as many steps in a row as fill this, so that the wait at its end costs nothing
MIB = 1 << 20


def peak_bytes(step: Step, device: str) -> int | None:
    """Most memory allocated during one warm step beyond what lives before it; None without a GPU."""
    if device != "cuda":
        step.run()
        return None
    free_memory(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_steps(contest: Contest, steps: Sequence[Step], setting: Setting, rounds: int, memory: bool) -> dict[str, dict]:
    """Results by step. One that fails or runs out of memory has an "error" instead of times; so has one whose loss on
    the timed batch is another than that of ours, computed first."""
    rounds = 1 if setting.dry_run else rounds
    timer = Timer(setting.device)
    rows: dict[str, dict] = {}
    runnable: dict[str, object] = {}
    repeats: dict[str, int] = {}
    expected = contest.eager().run()
    for step in steps:
        try:
            contest.same_loss(step, expected)
            for _ in range(0 if setting.dry_run else WARM_UP):
                step.run()
            timer.sync()
            start = time.perf_counter()
            step.run()
            timer.sync()
            seconds = time.perf_counter() - start
            repeats[step.name] = 1 if setting.dry_run else max(1, min(20, int(SAMPLE_SECONDS / seconds)))
            rows[step.name] = {}
            if memory:
                peak = peak_bytes(step, setting.device)
                if peak is not None:
                    rows[step.name] = {"peak_step_MiB": peak / MIB, "parameters_MiB": step.parameter_bytes / MIB}
            runnable[step.name] = _repeated(step, repeats[step.name], timer)
        except (GateError, torch.OutOfMemoryError) as error:
            rows[step.name] = {"error": first_line(error)}
            free_memory(setting.device)
    if not runnable:
        return rows
    samples = time_interleaved(runnable, rounds, time.perf_counter() + max(0.0, setting.remaining() - 5))
    for name, seconds in samples.items():
        each = [s / repeats[name] for s in seconds]
        stats = {f"ms_{key}": value for key, value in spread(each, 1e3).items()}
        rows[name] |= {**stats, "images_per_s": contest.images / (1e-3 * stats["ms_median"]), "rounds": len(each)}
    return rows


def _repeated(step: Step, times: int, timer: Timer):
    def run() -> None:
        for _ in range(times):
            step.run()
        timer.sync()

    return run


def fastest(rows: dict[str, dict], prefix: str) -> str | None:
    """Name of the fastest step whose name begins so; None without one."""
    names = [name for name, row in rows.items() if name.startswith(prefix) and "ms_median" in row]
    return min(names, key=lambda name: rows[name]["ms_median"], default=None)


def ratios(rows: dict[str, dict], ours: str, dense: str = "dense") -> dict:
    """How many times slower the fastest dense step is than ours, and how much more memory the most frugal one takes."""
    best = fastest(rows, dense)
    if best is None or "ms_median" not in rows.get(ours, {}):
        return {}
    result = {"fastest_dense": best, f"time_dense_over_{ours.replace(' ', '_')}": _over(rows, best, ours, "ms_median")}
    weighed = [name for name, row in rows.items() if name.startswith(dense) and "peak_step_MiB" in row]
    if weighed and "peak_step_MiB" in rows[ours]:
        frugal = min(weighed, key=lambda name: rows[name]["peak_step_MiB"])
        result |= {
            "frugal_dense": frugal,
            "peak_step_dense_over_ours": _over(rows, frugal, ours, "peak_step_MiB"),
            "peak_with_parameters_dense_over_ours": _total(rows[frugal]) / _total(rows[ours]),
        }
    return result


def _over(rows: dict[str, dict], a: str, b: str, key: str) -> float:
    return rows[a][key] / rows[b][key]


def _total(row: dict) -> float:
    return row["peak_step_MiB"] + row["parameters_MiB"]
