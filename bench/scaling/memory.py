"""Memory of a step, counted and not sampled: what PyTorch's allocator hands out, and the schedule's hidden chunks.

The schedule's rule (``schedule.chunks``): a hidden tensor [rows, H] is made for whole images at a time, as many as fit
the budget of ``schedule.chunk_bytes``, but at least one image, and at least H / 2 rows. So its bytes are at most

    max(budget, H / 2 * H * itemsize, those of one image),

which the batch does not enter.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from convnextv2_kernels import schedule
from convnextv2_kernels.params import Segments

from ..profiler import events_of, peak_bytes, requests

_RANGE = "hidden chunk of pass "
# The CUDA allocator hands out blocks larger than asked for by up to this; the CPU's does not.
ROUNDING = {"cpu": 0, "cuda": 1 << 20}


@dataclass
class Pass:
    """One run of the schedule over a batch, forward or backward, with bytes of hidden tensors [rows, H]."""

    hidden: int
    chunks: int
    chunk_bytes: int
    whole_bytes: int
    limit_bytes: int
    storages: list[int] = field(default_factory=list)


def limit_bytes(hidden: int, itemsize: int, budget: int, rows_of_largest_image: int) -> int:
    """Most bytes the rule above gives one hidden tensor, whatever the batch."""
    rows = max(budget // (hidden * itemsize), hidden // 2, rows_of_largest_image)
    return rows * hidden * itemsize


def _rows_of_largest_image(images: Segments, rows: int) -> int:
    if images.offsets is None:
        return rows // max(1, images.count)
    return int(images.offsets.diff().max()) * images.rows_per_slot if images.count else 0


class _Observed(list):
    """Chunks of one pass. Going through them opens a range of a running profiler for each; a forward pass of a single
    chunk takes it without, and has no range."""

    def __init__(self, parts: Sequence[schedule.Chunk], label: str) -> None:
        super().__init__(parts)
        self.label = label

    def __iter__(self) -> Iterator[schedule.Chunk]:
        for part in super().__iter__():
            with torch.profiler.record_function(self.label):
                yield part


@contextmanager
def observed_passes() -> Iterator[list[Pass]]:
    """Every pass of the schedule inside the context, in order. Each chunk's work is a range of a running profiler."""
    passes: list[Pass] = []
    original = schedule.chunks

    def observed(images: Segments, rows: int, hidden: int, itemsize: int, budget: int) -> _Observed:
        parts = list(original(images, rows, hidden, itemsize, budget))
        width, index = hidden * itemsize, len(passes)
        largest = max((part.r1 - part.r0 for part in parts), default=0)
        limit = limit_bytes(hidden, itemsize, budget, _rows_of_largest_image(images, rows))
        passes.append(Pass(hidden, len(parts), largest * width, rows * width, limit))
        return _Observed(parts, f"{_RANGE}{index}")

    schedule.chunks = observed
    try:
        yield passes
    finally:
        schedule.chunks = original


def allocations(step: Callable[[], object], device: str) -> tuple[int, dict[int, list[int]]]:
    """Peak of live bytes during ``step()`` beyond those at its start, and sizes of what each pass's chunks allocate."""
    events = events_of(step, device)
    ranges = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), int(event.name().removeprefix(_RANGE)))
        for event in events
        if event.name().startswith(_RANGE)
    ]
    starts = [start for start, _, _ in ranges]
    memory = requests(events, device)
    sizes: dict[int, list[int]] = defaultdict(list)
    for event in memory:
        at = bisect.bisect_right(starts, event.start_ns()) - 1
        if event.nbytes() > 0 and at >= 0 and event.start_ns() <= ranges[at][1]:
            sizes[ranges[at][2]].append(event.nbytes())
    return peak_bytes(memory), sizes


def names_of_blocks(depths: list[int], decoder_depth: int) -> list[str]:
    """Stage of every block of FCMAE, in the order of forward."""
    names = [f"stage {stage}" for stage, depth in enumerate(depths, start=1) for _ in range(depth)]
    return names + ["decoder"] * decoder_depth


def step_memory(step: Callable[[], object], blocks: list[str], device: str) -> dict:
    """Working memory of one warm FCMAE step, JSON-ready.

    Args:
        step: forward and backward, already run once.
        blocks: stage of each block, see :func:`names_of_blocks`.

    Returns:
        ``peak_bytes``: most live bytes beyond those at the start. ``hidden``: by stage, ``chunk_bytes`` of the largest
        hidden tensor, ``chunks`` per pass, ``whole_bytes`` of the whole batch's, ``limit_bytes`` of the rule,
        ``storages`` of a chunk's size the allocator handed out, and the ``largest_storage_bytes`` it did inside of
        chunks. Empty where the backend does not run the schedule (the reference).
    """
    with observed_passes() as passes:
        peak, sizes = allocations(step, device)
    if len(passes) not in (0, 2 * len(blocks)):
        raise RuntimeError(f"the schedule ran {len(passes)} times in a step, expected twice for each of {len(blocks)}")
    for index, one in enumerate(passes):
        one.storages = sizes[index]
    stages: dict[str, list[Pass]] = defaultdict(list)
    # Backward runs the blocks in reverse order.
    for name, one in zip(blocks + blocks[::-1], passes, strict=False):
        stages[name].append(one)
    return {"peak_bytes": peak, "hidden": {name: _of_stage(group, ROUNDING[device]) for name, group in stages.items()}}


def _of_stage(passes: list[Pass], rounding: int) -> dict:
    chunk = max(one.chunk_bytes for one in passes)
    storages = [size for one in passes for size in one.storages]
    return {
        "hidden_width": passes[0].hidden,
        "chunks": max(one.chunks for one in passes),
        "chunk_bytes": chunk,
        "whole_bytes": max(one.whole_bytes for one in passes),
        "limit_bytes": max(one.limit_bytes for one in passes),
        "storages": sum(chunk <= size <= chunk + rounding for size in storages),
        "largest_storage_bytes": max(storages, default=0),
        "rounding": rounding,
    }


def chunk_verdict(points: Sequence[tuple[int, dict]], save: str = "inputs") -> dict:
    """Whether hidden chunks stay within a bound while the batch grows; ``reason`` says why in a sentence.

    Args:
        points: (batch size, ``hidden`` of :func:`step_memory`), all else equal.
        save: the policy of ``schedule.save_policy``.

    ``bounded`` is True where no hidden tensor exceeds the bound that the schedule's rule gives for the *smallest*
    batch, the allocator's account agrees, and the largest batch would exceed that bound were it not cut.
    """
    points = sorted(points, key=lambda point: point[0])
    if not points or not all(hidden for _, hidden in points):
        return {"bounded": False, "reason": "the backend makes hidden tensors of the whole batch: no chunks"}
    (first, smallest), (last, largest) = points[0], points[-1]
    limits = {name: stage["limit_bytes"] for name, stage in smallest.items()}
    found = {
        "largest_bytes": {
            str(batch): max(stage["chunk_bytes"] for stage in hidden.values()) for batch, hidden in points
        },
        "limits": limits,
        "limit_bytes": max(limits.values()),
        "whole_bytes": max(stage["whole_bytes"] for stage in largest.values()),
        "cut": [name for name, stage in largest.items() if stage["chunks"] > 1],
    }
    if save == "hidden":
        reason = "hidden activations of the whole batch are kept for backward (CONVNEXTV2_KERNELS_SAVE)"
        return {"bounded": False, "reason": reason, **found}
    for batch, hidden in points:
        for name, stage in hidden.items():
            wrong = _wrong_with(stage, limits[name])
            if wrong:
                return {"bounded": False, "reason": f"batch {batch}, {name}: {wrong}", **found}
    if not found["cut"]:
        reason = f"not shown: even {last} images fit in one chunk of every stage, so that it grows with the batch"
        return {"bounded": False, "reason": reason, **found}
    cut = (
        f"{name} {max(hidden[name]['chunk_bytes'] for _, hidden in points)} of {largest[name]['whole_bytes']} bytes"
        for name in found["cut"]
    )
    reason = (
        f"from batch {first} to {last} every stage keeps to its bound, at most {found['limit_bytes']} bytes; cut into "
        f"chunks at batch {last}, with the largest at any batch: {', '.join(cut)}"
    )
    return {"bounded": True, "reason": reason, **found}


def _wrong_with(stage: dict, limit: int) -> str | None:
    if stage["chunk_bytes"] > limit:
        return f"a hidden tensor has {stage['chunk_bytes']} bytes, the rule allows {limit}"
    if stage["chunk_bytes"] and not stage["storages"]:
        return f"the allocator handed out no storage of {stage['chunk_bytes']} bytes, the size of a chunk"
    # The first chunk also makes the output map of the whole batch, a quarter as wide.
    most = max(limit, stage["whole_bytes"] // 4) + stage["rounding"]
    if stage["chunks"] > 1 and stage["largest_storage_bytes"] > most:
        return f"the allocator handed out {stage['largest_storage_bytes']} bytes inside of a chunk, expected {most}"
    return None
