"""LayerNorm of rows ``[..., C]``, optionally written as the downsampling's 2x2 pixels, or of the visible rows of a
dense map.

Bandwidth-bound: every element is read once and written once. A program holds a few whole rows in registers, 16 elements
per thread, and computes mean and centred squares in two passes without reading twice. Wider rows, of more than 8192
columns, are read in blocks, once per pass; the later reads come from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import statistics_dtype
from ...params import Places, RowNorm
from .gelu import widen
from .launch import accumulator, cdiv, launch, next_power_of_2, operator
from .row_places import RowPlaces, map_row, statistics_row


class RowTile(NamedTuple):
    """``rows`` whole rows of up to ``columns`` columns; wider rows in blocks of that many."""

    rows: int
    columns: int
    warps: int


def row_tile(channels: int, each: int, widest: int) -> RowTile:
    """Tiles of ``each`` elements per thread of 4 warps, or of more warps for wide rows."""
    columns = next_power_of_2(channels)
    if columns > widest:
        columns = 32 * 8 * each
    rows = min(max(32 * 4 * each // columns, 1), 64)
    return RowTile(rows, columns, max(4, columns // (32 * each)))


@triton.jit
def _store_normalized(centred, r, weight, bias, target, columns, valid, C: tl.constexpr):
    """``centred r [weight] [+ bias]`` of the columns that exist."""
    held = columns < C
    result = centred * r[:, None]
    if weight is not None:
        result *= tl.load(weight + columns, mask=held, other=0.0)[None, :]
    if bias is not None:
        result += tl.load(bias + columns, mask=held, other=0.0)[None, :]
    place = target[:, None] + columns[None, :]
    tl.store(place, result.to(target.dtype.element_ty), mask=valid[:, None] & held[None, :])


@triton.jit
def norm_rows_kernel(
    x, weight, bias, y, mean, rstd, rows, half_width, patch_of_slot, grid_w,
    SIDE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``y = (x - mean) rstd [weight] [+ bias]`` of rows that lie in x as :class:`RowPlaces` says."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = row < rows
    at = map_row(row, valid, half_width, patch_of_slot, grid_w, SIDE)
    kept = statistics_row(row, at, half_width)
    columns = tl.arange(0, BC)
    inside = valid[:, None] & (columns < C)[None, :]
    values = widen(tl.load((x + at * C)[:, None] + columns[None, :], mask=inside, other=0.0))
    mu = tl.sum(values, axis=1) / C
    centred = tl.where(inside, values - mu[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + EPS)
    if mean is not None:
        tl.store(mean + kept, mu, mask=valid)
    tl.store(rstd + kept, r, mask=valid)
    _store_normalized(centred, r, weight, bias, y + row * C, columns, valid, C)


@triton.jit
def norm_wide_rows_kernel(
    x, weight, bias, y, mean, rstd, rows, half_width, patch_of_slot, grid_w,
    SIDE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same for rows of more than BC columns."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = row < rows
    at = map_row(row, valid, half_width, patch_of_slot, grid_w, SIDE)
    kept = statistics_row(row, at, half_width)
    columns = tl.arange(0, BC)
    source = (x + at * C)[:, None] + columns[None, :]
    total = tl.zeros([BM, BC], ACC)
    for first in range(0, C, BC):
        total += widen(tl.load(source + first, mask=valid[:, None] & (first + columns < C)[None, :], other=0.0))
    mu = tl.sum(total, axis=1) / C
    total = tl.zeros([BM, BC], ACC)
    for first in range(0, C, BC):
        inside = valid[:, None] & (first + columns < C)[None, :]
        centred = widen(tl.load(source + first, mask=inside, other=0.0)) - mu[:, None]
        total += tl.where(inside, centred * centred, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(total, axis=1) / C + EPS)
    if mean is not None:
        tl.store(mean + kept, mu, mask=valid)
    tl.store(rstd + kept, r, mask=valid)
    for first in range(0, C, BC):
        inside = valid[:, None] & (first + columns < C)[None, :]
        centred = widen(tl.load(source + first, mask=inside, other=0.0)) - mu[:, None]
        _store_normalized(centred, r, weight, bias, y + row * C, first + columns, valid, C)


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    y: Tensor, mean: Tensor | None, rstd: Tensor, places: RowPlaces,
) -> None:  # fmt: skip
    rows, channels = rstd.numel(), x.shape[-1]
    tile = row_tile(channels, each=16, widest=8192)
    wide = channels > tile.columns
    constants = {"ACC": accumulator(x.dtype)} if wide else {}
    launch(
        norm_wide_rows_kernel if wide else norm_rows_kernel, (cdiv(rows, tile.rows),), num_warps=tile.warps,
        x=x, weight=weight, bias=bias, y=y, mean=mean, rstd=rstd, rows=rows,
        C=channels, EPS=eps, BM=tile.rows, BC=tile.columns, **constants, **places.arguments,
    )  # fmt: skip


@operator
def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x [..., C]``, weight and bias ``[C]`` -> y like x, mean and rstd ``[...]``."""
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=statistics_dtype(x.dtype)) for _ in range(2))
    _normalize(x, weight, bias, eps, y, mean, rstd, RowPlaces())
    return y, mean, rstd


@operator
def space_to_depth_normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``x [maps, 2h, 2w, C]`` -> ``y [maps, h, w, 4C]``, LayerNorm of every pixel, and rstd ``[maps, 2h, 2w]``."""
    maps, height, width, channels = x.shape
    y = x.new_empty(maps, height // 2, width // 2, 4 * channels)
    rstd = x.new_empty(maps, height, width, dtype=statistics_dtype(x.dtype))
    _normalize(x, weight, bias, eps, y, None, rstd, RowPlaces(width // 2))
    return y, rstd


def gather_normalize(x: Tensor, places: Places, norm: RowNorm) -> tuple[Tensor, Tensor]:
    """``x [N, Gh*s, Gw*s, C]`` -> LayerNorm of its visible rows ``[P, s, s, C]``, and their rstd ``[P, s, s]``."""
    shape = (places.patch_of_slot.shape[0], places.side, places.side)
    y, rstd = x.new_empty(*shape, x.shape[-1]), x.new_empty(shape, dtype=statistics_dtype(x.dtype))
    _normalize(x, *norm, y, None, rstd, RowPlaces.of(places))
    return y, rstd
