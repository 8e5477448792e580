"""Times of calls: CUDA graph replays between events on a GPU, a host clock in a dry run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 200 << 20  # more than three times the L2 of an H200
MOST_CALLS = 256
WARM_SECONDS = 0.002  # a graph of warm calls runs at least about this long


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


class Timer:
    """Times functions on ``device``; ``repetitions`` samples each."""

    def __init__(self, device: str, repetitions: int = 9):
        self.device, self.repetitions = device, repetitions

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def calls(self, functions: Sequence[Callable[[], object]], keep: bool = False) -> list[float]:
        """Seconds per call: each sample runs all functions in one CUDA graph and divides.

        Args:
            keep: the results of all functions live at once, so that outputs rotate through memory as inputs do.
        """
        run = self._graph(functions, keep) if self.on_gpu else _in_turn(functions)
        return [seconds / len(functions) for seconds in self.samples(run)]

    def samples(self, run: Callable[[], object]) -> list[float]:
        """Seconds of each of the repetitions of ``run``, back to back, so that the host stays ahead of the GPU."""
        if not self.on_gpu:
            return [_host_seconds(run) for _ in range(self.repetitions)]
        run()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.repetitions + 1)]
        self.sync()
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        self.sync()
        return [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]

    def _graph(self, functions: Sequence[Callable[[], object]], keep: bool) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                functions[0]()
        torch.cuda.current_stream().wait_stream(stream)
        self.sync()
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for function in functions:
                result = function()
                if keep:
                    kept.append(result)
                del result
        kept.clear()
        return graph.replay


def _in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for function in functions:
            function()

    return run


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cold_sets(bytes_per_call: int, dry_run: bool = False) -> int:
    """How many sets of buffers to rotate through, so that none is in the cache when its turn comes."""
    if dry_run:
        return 2
    return max(2, min(MOST_CALLS, -(-COLD_BYTES // max(1, bytes_per_call))))


def warm_calls(seconds: float, dry_run: bool = False) -> int:
    """How many calls on one set of buffers make a graph, given roughly how long one takes."""
    if dry_run:
        return 1
    return max(4, min(MOST_CALLS, int(WARM_SECONDS / max(seconds, 1e-7))))


def trim_memory(device: str, most: int = 20 << 30) -> None:
    """Gives unused memory back where there is a lot of it: memory of one CUDA graph serves no other."""
    if device == "cuda" and torch.cuda.memory_reserved() > most:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
