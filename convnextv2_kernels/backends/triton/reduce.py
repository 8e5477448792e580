"""Column sums over the rows of each segment, and the partition that all row passes share.

Bandwidth-bound: every element is read once, 2 to 4 bytes. A program is a block of columns of one part of a segment: it
walks down its rows in tiles of 16 elements per thread (8 of float64), with the sums in registers and the next tiles
loading, and writes one partial sum per column. The parts follow from the rows of a segment (on average where they
differ), not from the number of segments, so that equal segments give the same bits in any chunk of them. A part has at
least 64 rows if the segment does, and its partial sums are then at most 3 % of the bytes it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import statistics_dtype
from ...params import WHOLE_BATCH, Segments
from .gelu import activate, widen
from .launch import accumulator, cdiv, launch, next_power_of_2, operator
from .segments import segment_bounds

MOST_SPLITS = 1024  # per segment; also the most partial sums that one program adds
_WIDTHS = (128, 256, 64, 512, 32, 1024)
# sizes that change between calls: kernels are not recompiled for each
SIZES = ["M", "rows_per_slot", "count", "splits"]


class RowPass(NamedTuple):
    """A row pass: ``splits`` parts of each segment, the grid, and the kernel's arguments that follow from it."""

    splits: int
    grid: tuple[int, ...]
    arguments: dict


def _split_count(rows: int) -> int:
    """Number of parts of a segment with so many rows."""
    each = 64 if rows <= 1024 else 128 if rows <= 16384 else 256
    return max(1, min(cdiv(rows, each), MOST_SPLITS))


def _tile(rows: int, channels: int, dtype: torch.dtype, sums: int) -> tuple[int, int]:
    """Rows and columns of a tile: the first shape whose padding is within an eighth of the smallest. Half as large for
    a pass that keeps more than 2 sums of each element."""
    elements = (1024 if dtype == torch.float64 else 2048) // (2 if sums > 2 else 1)
    tiles = [(elements // columns, columns) for columns in _WIDTHS if columns <= elements]
    padded = [cdiv(max(rows, 1), r) * r * cdiv(channels, c) * c for r, c in tiles]
    return next(t for t, p in zip(tiles, padded, strict=True) if 8 * p <= 9 * min(padded))


def row_pass(x: Tensor, segments: Segments, sums: int = 2) -> RowPass:
    """The partition of a pass over ``x [..., H]`` in segments, with at most so many sums of each column."""
    offsets, rows_per_slot, count = segments
    channels = x.shape[-1]
    rows = x.numel() // channels
    each = rows // count if count else 0
    splits = _split_count(each)
    block = _tile(each, channels, x.dtype, sums)
    arguments = {
        "offsets": offsets, "rows_per_slot": rows_per_slot, "M": rows, "count": count, "splits": splits,
        "H": channels, "NARROW": x.dtype == torch.bfloat16, "BM": block[0], "BN": block[1],
    }  # fmt: skip
    return RowPass(splits, (count * splits * cdiv(channels, block[1]),), arguments)


@triton.jit
def part_and_columns(H: tl.constexpr, BN: tl.constexpr):
    """This program's part, ``segment * splits + split``, and columns. Neighbours in the grid share rows."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (H + BN - 1) // BN
    return program // blocks, program % blocks * BN + tl.arange(0, BN)


@triton.jit
def part_rows(part, offsets, rows_per_slot, M, count, splits, BM: tl.constexpr):
    """First row of a part, int64, and the number of its rows: whole tiles, except for the last part of a segment."""
    begin, end = segment_bounds(part // splits, offsets, rows_per_slot, M, count)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BM) * BM
    begin = tl.minimum(begin + part % splits * share, end)
    return begin, tl.minimum(end - begin, share).to(tl.int32)


@triton.jit(do_not_specialize=SIZES)
def column_sums_kernel(
    x, grad, h, partials, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr, SQUARE: tl.constexpr,
    BOTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``partials [count * splits, 1 or 2, H]`` of act(x) or its SQUARE, with grad of grad * act(x), or of BOTH that and
    grad; act(x) is written to h unless None."""
    part, columns = part_and_columns(H, BN)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    held = columns < H
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    total = tl.zeros([BM, BN], ACC)
    other = tl.zeros([BM, BN], ACC)
    for first in tl.range(0, rows, BM, num_stages=3):
        inside = (row < rows - first)[:, None] & held[None, :]
        at = (begin + first) * H
        value = activate(widen(tl.load(x + at + place, mask=inside, other=0.0)), ACT, NARROW)
        if h is not None:
            tl.store(h + at + place, value.to(h.dtype.element_ty), mask=inside)
        if grad is not None:
            g = widen(tl.load(grad + at + place, mask=inside, other=0.0))
            total += g * value
            if BOTH:
                other += g
        elif SQUARE:
            total += value * value
        else:
            total += value
    sums: tl.constexpr = 2 if BOTH else 1
    out = partials + part.to(tl.int64) * (sums * H) + columns
    tl.store(out, tl.sum(total, axis=0), mask=held)
    if BOTH:
        tl.store(out + H, tl.sum(other, axis=0), mask=held)


def partial_sums(
    x: Tensor, grad: Tensor | None, h: Tensor | None, act: str, square: bool, both: bool, segments: Segments
) -> Tensor:
    """``[segments, splits, 1 or 2, H]``: the sums of :func:`column_sums_kernel`."""
    passes = row_pass(x, segments)
    shape = (segments.count, passes.splits, 2 if both else 1, x.shape[-1])
    partials = x.new_empty(shape, dtype=statistics_dtype(x.dtype))
    launch(
        column_sums_kernel, passes.grid, x=x, grad=grad, h=h, partials=partials, **passes.arguments,
        ACT=act, ACC=accumulator(x.dtype), SQUARE=square, BOTH=both,
    )  # fmt: skip
    return partials


@triton.jit(do_not_specialize=["splits", "each", "groups"])
def add_partials_kernel(
    partials, out, second, splits, each, groups,
    W: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``partials [.., splits, W]`` -> ``out [.., groups, W]``, group g the sum of splits g * each up to the next. With
    second the leading size is 2, and second takes the other of them."""
    blocks: tl.constexpr = (W + BC - 1) // BC
    group = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    held = columns < W
    lead = group // groups
    begin = group % groups * each
    end = tl.minimum(begin + each, splits)
    split = tl.arange(0, BS)
    source = partials + (tl.cast(lead, tl.int64) * splits + begin) * W
    total = tl.zeros([BS, BC], ACC)
    for first in range(0, end - begin, BS):
        inside = (split < end - begin - first)[:, None] & held[None, :]
        at = source + tl.cast(first, tl.int64) * W
        total += tl.load(at + (split[:, None] * W + columns[None, :]), mask=inside, other=0.0)
    sums = tl.sum(total, axis=0)
    if second is None:
        tl.store(out + tl.cast(group, tl.int64) * W + columns, sums, mask=held)
    elif lead == 0:
        tl.store(out + columns, sums, mask=held)
    else:
        tl.store(second + columns, sums, mask=held)


def _add(partials: Tensor, groups: int, each: int, out: Tensor, second: Tensor | None = None) -> None:
    lead, splits, width = partials.shape
    columns = min(32, next_power_of_2(width))
    launch(
        add_partials_kernel, (lead * groups * cdiv(width, columns),), num_warps=8,
        partials=partials, out=out, second=second, splits=splits, each=each, groups=groups,
        W=width, ACC=accumulator(partials.dtype), BS=min(128, next_power_of_2(each)), BC=columns,
    )  # fmt: skip


def _few(partials: Tensor) -> Tensor:
    """Few enough partial sums for one program to add: very many are first added in groups."""
    lead, splits, width = partials.shape
    if splits <= MOST_SPLITS:
        return partials
    each = cdiv(splits, 64)
    merged = partials.new_empty(lead, cdiv(splits, each), width)
    _add(partials, merged.shape[1], each, merged)
    return merged


def add_partials(partials: Tensor) -> Tensor:
    """``A[groups, splits, W]`` -> ``A[groups, W]``, in a fixed order; zeros where there are no splits."""
    lead, splits, width = partials.shape
    if splits == 1:
        return partials.view(lead, width)
    out = partials.new_empty(lead, width)
    partials = _few(partials)
    _add(partials, 1, partials.shape[1], out)
    return out


def add_pair(partials: Tensor) -> tuple[Tensor, Tensor]:
    """``A[2, splits, W]`` -> two ``A[W]`` of their own."""
    first, second = (partials.new_empty(partials.shape[2]) for _ in range(2))
    partials = _few(partials)
    _add(partials, 1, partials.shape[1], first, second)
    return first, second


@operator
def column_sum(x: Tensor) -> Tensor:
    """``[M, C]`` -> ``A[C]``."""
    partials = partial_sums(x, None, None, "none", False, False, WHOLE_BATCH)
    return add_partials(partials.view(1, -1, x.shape[1])).view(-1)
