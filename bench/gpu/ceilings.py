"""What this GPU can do at most: copy bandwidth, matrix products, and the least time of a kernel and of a launch."""

from __future__ import annotations

import time

import torch

from convnextv2_kernels.benchmark.machine import free_memory

from ..ceilings import copy_rate, matmul_rate
from .results import Recorder
from .setting import Setting
from .timing import Timer, median

GIB = 1 << 30


def copy_tbps(timer: Timer, size: int, calls: int) -> float:
    """TB/s, bytes read plus bytes written, of a device-to-device copy of ``size`` bytes."""
    return 1e-12 * copy_rate(2 * size, torch.float32, timer.device, lambda call: median(timer.calls([call] * calls)))


def matmul_tflops(timer: Timer, n: int, dtype: torch.dtype) -> float:
    """TFLOP/s of an n x n x n product of random matrices."""
    return 1e-12 * matmul_rate(n, dtype, timer.device, lambda call: median(timer.calls([call] * 3)))


def kernel_floor(timer: Timer, calls: int) -> float:
    """Microseconds of a kernel that does next to nothing, inside a CUDA graph."""
    x = torch.zeros(32, device=timer.device)
    return 1e6 * median(timer.calls([lambda: x.add_(1.0)] * calls))


def launch_cost(timer: Timer, run, calls: int) -> float:
    """Microseconds of host time of a call that is launched eagerly."""
    run()
    samples = []
    for _ in range(timer.repetitions):
        timer.sync()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - start) / calls)
        timer.sync()
    return 1e6 * median(samples)


def run(setting: Setting, recorder: Recorder) -> None:
    dry, device = setting.dry_run, setting.device
    timer = Timer(device, 1 if dry else 9)
    large, small, n, calls = (1 << 16, 1 << 12, 32, 3) if dry else (GIB, 8 << 20, 8192, 400)

    def case(key: str, measure) -> None:
        recorder.case("rates", key, measure, needs=2, limit=40)
        free_memory(device)

    case("copy_large_TBps", lambda: copy_tbps(timer, large, 4))
    case("copy_8MiB_in_cache_TBps", lambda: copy_tbps(timer, small, 100 if not dry else 2))
    case("matmul_bf16_TFLOPs", lambda: matmul_tflops(timer, n, torch.bfloat16))
    case("matmul_fp32_TFLOPs", lambda: matmul_tflops(timer, n // 2, torch.float32))
    case("kernel_floor_in_graph_us", lambda: kernel_floor(timer, calls))
    x = torch.zeros(32, device=device)
    case("eager_launch_torch_us", lambda: launch_cost(timer, lambda: x.add_(1.0), calls))
    case("eager_launch_own_us", lambda: launch_cost(timer, own_operator(setting), calls))


def own_operator(setting: Setting):
    """A small call of an operator of this library."""
    from .operators import namespace

    ops = namespace(setting)
    rows, weight = (torch.ones(*shape, device=setting.device) for shape in ((8, 64), (64,)))
    return lambda: ops.layer_norm_forward.default(rows, weight, weight, 1e-6)
