"""Host time of a block as counts: Python function calls and operator dispatches, which no clock can disturb.

The block has one site, so that nothing but the calling is left; in microseconds it is part of ``python -m bench ops``.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType

import torch

import convnextv2_kernels as ck

from ..ops.host_time import calls_of, fused_dense_block, packed_block
from ..profiler import events_of
from .trace import dispatches

WIDTH = 40


def python_calls(call: Callable[[], object]) -> int:
    """Python functions that ``call()`` enters, itself not counted; functions written in C are not Python's."""
    entered = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal entered
        entered += event == "call"

    before = sys.getprofile()
    collecting = gc.isenabled()
    gc.disable()  # finalizers would be counted
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return entered - 1


def counts_of(call: Callable[[], object]) -> dict[str, int]:
    """``python_calls`` and ``dispatches``, those that operators make included, of a warm call."""
    for _ in range(3):
        call()
    return {"python_calls": python_calls(call), "dispatches": dispatches(events_of(call, "cpu"))}


def measure(log: Callable[[str], None] = lambda text: None) -> dict[str, dict[str, int]]:
    """Forward, and forward and backward, of our packed block and of an official block after ``fuse``."""
    log("host time of a block")
    torch.manual_seed(0)
    dense, packed = torch.randn(1, WIDTH, 1, 1), torch.randn(1, 1, 1, WIDTH)
    results = {}
    with ck.use_backend("cpu"):
        blocks = {"packed block": (packed_block(WIDTH), packed), "fused dense block": (fused_dense_block(WIDTH), dense)}
        for name, pair in blocks.items():
            for kind, call in calls_of(*pair).items():
                results[f"{name}, {kind}"] = counts_of(call)
    return results
