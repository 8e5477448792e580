"""A step under PyTorch's profiler: what it asked of the allocator, and which ranges and operators it ran.

The allocator's own account gives the same bytes every time, where resident memory moves in pages and with the C
library's moods. It misses the scratch memory that vendor libraries take for themselves: the peak of a fresh process,
see :mod:`.memory`, has that.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from convnextv2_kernels.benchmark.machine import synchronize


@contextmanager
def _without_notices() -> Iterator[None]:
    """Drops the "USDT:" lines that some builds of PyTorch's profiler write to standard error whenever they start and
    stop, straight from C++ and on a level that is read when PyTorch is loaded; every other line is passed on."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for written in file.readlines():
                if not written.startswith(b"USDT:"):
                    os.write(2, written)


def events_of(step: Callable[[], object], device: str) -> list:
    """The profiler's events of ``step()``, memory included, in the order of their start."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _without_notices():
        profiler.start()
    try:
        step()
        synchronize(device)
    finally:
        with _without_notices():
            profiler.stop()
    return sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())


def requests(events: Iterable, device: str) -> list:
    """Those events that ask memory of a device's allocator (``nbytes() > 0``) or give it back (``< 0``)."""
    kind = {"cpu": torch.profiler.DeviceType.CPU, "cuda": torch.profiler.DeviceType.CUDA}[device]
    found = [event for event in events if event.name() == "[memory]" and event.device_type() == kind]
    if not found:
        raise RuntimeError("PyTorch's profiler reported no memory at all")
    return found


def peak_bytes(memory: Iterable) -> int:
    """Most live bytes during a step, of its :func:`requests`, beyond those before it."""
    live = peak = 0
    for event in memory:
        live += event.nbytes()
        peak = max(peak, live)
    return peak
