"""What one training step asks of PyTorch: memory of its allocator and calls of its dispatcher."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence

from torch import Tensor

from convnextv2_kernels.benchmark.memory import saved_bytes

from ..profiler import events_of, peak_bytes, requests

OWN = "convnextv2_kernels"
_CALL = re.compile(r"([A-Za-z_]\w*)::[A-Za-z_]\w*")
_ENGINE = "autograd"  # PyTorch's own marks of the nodes of backward, no operators


def kept(forward: Callable[[], Tensor], alive: Sequence[Tensor]) -> dict[str, int]:
    """Bytes saved for backward by ``forward()``, a scalar; ``alive`` are its inputs and parameters, which do not count.

    Runs backward as well, and drops the gradients."""
    _drop_gradients(alive)
    total = saved_bytes(forward, alive)
    _drop_gradients(alive)
    return {"saved_bytes": total}


def measured(forward: Callable[[], Tensor], alive: Sequence[Tensor]) -> dict[str, int]:
    """What :func:`kept` returns, and bytes and calls of one more step, forward and backward, gradients included.

    ``peak_bytes``: most memory above that before the step, of PyTorch's CPU allocator. ``allocated_bytes``: sum of all
    requests to it. ``aten_calls``, ``own_calls``, ``other_calls``: dispatched operators by namespace, with those that
    operators call.
    """
    saved = kept(forward, alive)  # also the warm step: tables of a layout are built once
    # A collection in mid-step would free at a moment that depends on what ran before.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        events = events_of(lambda: forward().backward(), "cpu")
    finally:
        if collecting:
            gc.enable()
    _drop_gradients(alive)
    memory = requests(events, "cpu")
    allocated = sum(max(0, event.nbytes()) for event in memory)
    return {**saved, "peak_bytes": peak_bytes(memory), "allocated_bytes": allocated, **_calls(events)}


def _calls(events) -> dict[str, int]:
    counts = {"aten_calls": 0, "own_calls": 0, "other_calls": 0}
    for event in events:
        found = _CALL.fullmatch(event.name())
        if found and found[1] != _ENGINE:
            counts[{"aten": "aten_calls", OWN: "own_calls"}.get(found[1], "other_calls")] += 1
    return counts


def dispatches(events) -> int:
    """Dispatched operators, with those that operators call."""
    return sum(_calls(events).values())


def _drop_gradients(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None
