"""Gradients of LayerNorm: from its input rows, from saved normalised rows, for the downsampling's 2x2 pixels,
and into the visible patches of a dense map.

With ``z = (x - mean) rstd`` and ``g = grad weight``: ``dx = rstd (g - mean(g) - z mean(g z))``, ``dweight`` is the sum
of ``grad z`` over all rows and ``dbias`` the sum of grad. Bandwidth-bound: two reads and one write per element.

A program walks over every ``splits``-th block of rows with the sums of its columns in registers, 8 elements per thread
and sum, and writes one partial sum per column; a second kernel adds those. The loads of the next block overlap with the
computation. Splits follow from the shape: at most 512, about four per multiprocessor of a large GPU, each with enough
rows that its partial sums cost little. Rows of more than 4096 columns do not fit this scheme: a separate pass computes
their two means, and then programs process blocks of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import statistics_dtype
from ...params import Places
from .gelu import widen
from .launch import accumulator, cdiv, launch, operator
from .norm import row_tile
from .reduce import add_pair
from .row_places import RowPlaces, map_row, statistics_row

_MOST_SPLITS = 512
_SAME = RowPlaces()


@triton.jit
def _gradient_and_z(grad, x, mean, r, row, kept, columns, valid, C: tl.constexpr):
    """grad and z of a tile, zero outside."""
    inside = valid[:, None] & (columns < C)[None, :]
    place = (row * C)[:, None] + columns[None, :]
    d = widen(tl.load(grad + place, mask=inside, other=0.0))
    z = widen(tl.load(x + place, mask=inside, other=0.0))
    if mean is not None:
        mu = tl.load(mean + kept, mask=valid, other=0.0)
        z = tl.where(inside, (z - mu[:, None]) * r[:, None], 0.0)
    return d, z


@triton.jit
def _weighted(d, w):
    if w is None:
        return d
    else:
        return d * w[None, :]


@triton.jit
def row_means_kernel(
    grad, x, mean, rstd, weight, means, rows, half_width, patch_of_slot, grid_w,
    SIDE: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``means [rows, 2]``: mean(g) and mean(g z) of each row."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = row < rows
    at = statistics_row(row, map_row(row, valid, half_width, patch_of_slot, grid_w, SIDE), half_width)
    r = tl.load(rstd + at, mask=valid, other=0.0)
    total = tl.zeros([BM, BC], ACC)
    dot = tl.zeros([BM, BC], ACC)
    for first in range(0, C, BC):
        columns = first + tl.arange(0, BC)
        d, z = _gradient_and_z(grad, x, mean, r, row, at, columns, valid, C)
        w = None
        if weight is not None:
            w = tl.load(weight + columns, mask=columns < C, other=0.0)
        g = _weighted(d, w)
        total += g
        dot += g * z
    tl.store(means + row * 2, tl.sum(total, axis=1) / C, mask=valid)
    tl.store(means + row * 2 + 1, tl.sum(dot, axis=1) / C, mask=valid)


@triton.jit
def norm_backward_kernel(
    grad, x, mean, rstd, weight, means, dx, partials, rows, splits, half_width, patch_of_slot, grid_w,
    SIDE: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx, and ``partials [2, splits, C]`` of dweight and dbias unless None. Rows of grad and x are in the order of
    forward's y, those of dx lie as forward's x does, those of mean and rstd as forward left them. mean None: x is z;
    weight None: 1; means None: tiles hold whole rows."""
    split = tl.program_id(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    held = columns < C
    w = None
    if weight is not None:
        w = tl.load(weight + columns, mask=held, other=0.0)
    dweight = tl.zeros([BM, BC], ACC)
    dbias = tl.zeros([BM, BC], ACC)
    for block in tl.range(split, tl.cdiv(rows, BM), splits, num_stages=STAGES):
        row = tl.cast(block, tl.int64) * BM + tl.arange(0, BM)
        valid = row < rows
        at = map_row(row, valid, half_width, patch_of_slot, grid_w, SIDE)
        kept = statistics_row(row, at, half_width)
        r = tl.load(rstd + kept, mask=valid, other=0.0)
        d, z = _gradient_and_z(grad, x, mean, r, row, kept, columns, valid, C)
        g = _weighted(d, w)
        if means is None:
            of_g = tl.sum(g, axis=1) / C
            of_gz = tl.sum(g * z, axis=1) / C
        else:
            of_g = tl.load(means + row * 2, mask=valid, other=0.0)
            of_gz = tl.load(means + row * 2 + 1, mask=valid, other=0.0)
        if partials is not None:
            dweight += d * z
            dbias += d
        result = r[:, None] * (g - of_g[:, None] - z * of_gz[:, None])
        place = (at * C)[:, None] + columns[None, :]
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=valid[:, None] & held[None, :])
    if partials is not None:
        out = partials + split.to(tl.int64) * C + columns
        tl.store(out, tl.sum(dweight, axis=0), mask=held)
        tl.store(out + tl.cast(splits, tl.int64) * C, tl.sum(dbias, axis=0), mask=held)


def _backward(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, dx: Tensor,
    places: RowPlaces = _SAME, parameters: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Writes ``dx [..., C]``; returns it, and partial sums of the parameters' gradients if they are requested."""
    rows, channels, stat = rstd.numel(), dx.shape[-1], statistics_dtype(x.dtype)
    tile = row_tile(channels, each=8, widest=4096)
    common = {
        "grad": grad, "x": x, "mean": mean, "rstd": rstd, "weight": weight, "rows": rows, **places.arguments,
        "C": channels, "ACC": accumulator(x.dtype), "BM": tile.rows, "BC": tile.columns,
    }  # fmt: skip
    means = partials = None
    if channels > tile.columns:
        means = x.new_empty(rows, 2, dtype=stat)
        launch(row_means_kernel, (cdiv(rows, tile.rows),), num_warps=tile.warps, means=means, **common)
    splits = cdiv(rows, tile.rows)
    if parameters:
        splits = max(1, min(_MOST_SPLITS, rows // max(8, 2 * tile.rows)))
        partials = x.new_empty(2, splits, channels, dtype=stat)
    launch(
        norm_backward_kernel, (splits, cdiv(channels, tile.columns)), num_warps=tile.warps,
        means=means, dx=dx, partials=partials, splits=splits, STAGES=2 if parameters else 1, **common,
    )  # fmt: skip
    return dx, partials


def _added(dx: Tensor, partials: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias from what :func:`_backward` returns."""
    assert partials is not None
    dweight, dbias = add_pair(partials)
    return dx, dweight, dbias


@operator
def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, ``x [..., C]``, mean, rstd ``[...]``, weight ``[C]`` -> dx like x, dweight and dbias ``[C]``."""
    return _added(*_backward(grad, x, mean, rstd, weight, torch.empty_like(x)))


@operator
def normalized_backward(dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the normalised rows z."""
    return _added(*_backward(dy, z, None, rstd, weight, torch.empty_like(z)))


def normalized_gradient(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """dx from the gradient of z and from x."""
    return _backward(g, x, mean, rstd, None, torch.empty_like(x), parameters=False)[0]


def normalized_backward_input(dy: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """dx alone, without a weight."""
    return _backward(dy, z, None, rstd, None, torch.empty_like(z), parameters=False)[0]


@operator
def space_to_depth_normalize_backward(
    dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, ``z [maps, h, w, 4C]``, rstd ``[maps, 2h, 2w]``, weight ``[C]`` -> dx ``[maps, 2h, 2w, C]``, dweight and
    dbias ``[C]``."""
    dx = z.new_empty(*rstd.shape, weight.numel())
    return _added(*_backward(dy, z, None, rstd, weight, dx, RowPlaces(rstd.shape[2] // 2)))


def normalized_backward_put(
    dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, places: Places, dx: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dy, ``z [P*s*s, C]``, ``rstd [P*s*s]`` -> the visible rows of the map ``dx [N, Gh*s, Gw*s, C]``; with weight
    dweight and dbias ``[C]``."""
    _, partials = _backward(dy, z, None, rstd, weight, dx, RowPlaces.of(places), parameters=weight is not None)
    return (None, None) if partials is None else _added(dx, partials)[1:]
