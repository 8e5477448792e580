"""What this machine can do at most, measured beside the ops, so that their times become shares of a limit."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from convnextv2_kernels.benchmark.counts import Work
from convnextv2_kernels.benchmark.machine import synchronize, synchronized

# Bytes moved (read and written) by one copy: from what the first cache holds to what hardly any does.
TRAFFIC = tuple(1 << power for power in range(16, 31, 2))
PRODUCTS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
SAMPLE_SECONDS = 0.02
SAMPLES = 3


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device and dtype.

    Attributes:
        gflops: of the fastest GEMM.
        product: which one it was.
        gbytes: bytes moved by a call -> 10^9 bytes per second that the fastest copy or sum of maps reaches.
    """

    gflops: float
    product: str
    gbytes: dict[int, float]

    def bandwidth(self, traffic: float) -> float:
        """GB/s for a call that moves ``traffic`` bytes: small maps stay in a cache, and the limit is that cache's.

        Between two measured sizes the rate of the smaller one counts, and a larger size's where that is faster (the
        smallest copies are slowed by the cost of a call), so that the limit is never too kind.
        """
        smaller = max((size for size in self.gbytes if size <= traffic), default=0)
        return max(rate for size, rate in self.gbytes.items() if size >= smaller)

    def limit_ms(self, work: Work) -> float:
        """Least time of a call that does this work: of moving its bytes, or of its flops, whichever is longer."""
        return 1e-6 * max(work.bytes / self.bandwidth(work.bytes), work.flops / self.gflops)

    def bound(self, work: Work) -> str:
        """ "memory" or "compute", whichever limits a call."""
        return "memory" if work.bytes / self.bandwidth(work.bytes) >= work.flops / self.gflops else "compute"

    def to_json(self) -> dict:
        """JSON-ready."""
        copies = [{"traffic_bytes": size, "gbytes": round(rate, 2)} for size, rate in self.gbytes.items()]
        return {"gflops": round(self.gflops, 1), "product": self.product, "copies": copies}

    def best(self, other: Ceilings) -> Ceilings:
        """The faster of two measurements, rate by rate: what disturbs a machine only slows it."""
        faster = self if self.gflops >= other.gflops else other
        gbytes = {size: max(rate, other.gbytes[size]) for size, rate in self.gbytes.items()}
        return Ceilings(faster.gflops, faster.product, gbytes)


def seconds_of(call: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Least mean time of a warm call over a few samples, each of as many calls as fill 20 ms."""
    run = synchronized(call, device)
    run()
    start = clock()
    run()
    calls = max(1, math.ceil(SAMPLE_SECONDS / max(clock() - start, 1e-9)))
    best = math.inf
    for _ in range(SAMPLES):
        start = clock()
        for _ in range(calls):
            call()
        synchronize(device)
        best = min(best, (clock() - start) / calls)
    return best


def copy_rate(traffic: int, dtype: torch.dtype, device: str, seconds: Callable[[Callable], float]) -> float:
    """Bytes per second, read plus written, of a copy that moves ``traffic`` bytes; ``seconds`` times a call."""
    source = torch.ones(traffic // 2 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def sum_rate(traffic: int, dtype: torch.dtype, device: str, seconds: Callable[[Callable], float]) -> float:
    """The same of a sum of two maps."""
    a, b = (torch.ones(traffic // 3 // dtype.itemsize, dtype=dtype, device=device) for _ in range(2))
    total = torch.empty_like(a)
    return 3 * a.nbytes / seconds(lambda: torch.add(a, b, out=total))


def matmul_rate(side: int, dtype: torch.dtype, device: str, seconds: Callable[[Callable], float]) -> float:
    """FLOP/s of a square GEMM of random matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b)


def traffic_rate(traffic: int, dtype: torch.dtype, device: str) -> float:
    """GB/s: the faster of a copy and a sum of two maps that move ``traffic`` bytes."""
    seconds = functools.partial(seconds_of, device=device)
    return 1e-9 * max(rate(traffic, dtype, device, seconds) for rate in (copy_rate, sum_rate))


def product_rates(side: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """GFLOP/s of a square product by the two libraries that PyTorch calls: as a matrix product and as a convolution."""
    a, b = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    maps, weight = a.t().reshape(1, side, 1, side).contiguous(memory_format=torch.channels_last), b[:, :, None, None]
    seconds = functools.partial(seconds_of, device=device)
    return {
        f"matmul {side}": 1e-9 * matmul_rate(side, dtype, device, seconds),
        f"conv1x1 {side}": 2e-9 * side**3 / seconds(lambda: F.conv2d(maps, weight)),
    }


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Ceilings:
    """Measure all rates once, in a few seconds."""
    products: dict[str, float] = {}
    with torch.no_grad():
        for side in PRODUCTS[device]:
            products |= product_rates(side, dtype, device)
        gbytes = {traffic: traffic_rate(traffic, dtype, device) for traffic in TRAFFIC}
    fastest = max(products, key=products.__getitem__)
    return Ceilings(products[fastest], fastest, gbytes)
