"""The GEMMs of the MLP's backward pass, fused with their neighbours, for images of many rows and narrow blocks.

With ``G_n = h_n' d_n`` per image (``[H, O]``), ``t[n] = sum_o G_n w2`` and ``dW2 = sum_n G_n scale_n``: t, and with it
kappa, is known before ``ds = d W2`` exists, so that ds lives in registers only:

* ``image_products`` computes h from a in its prologue, and t from G before storing it;
* ``hidden_backward`` steps through the hidden width: ``ds = d w2``, ``da = (ds scale + h kappa) act'(a)``,
  stored for the first weight's gradient and summed for the first bias's, and ``dz += da w1``; finally LayerNorm's
  backward, for which the whole row is available. Hidden tensors: a is read twice, da written once.

``weight_product`` is ``dW2 = d' (act(a) scale)`` for shapes without G: the scaled activations are not stored.

A width that is not a power of two is split in two, 96 = 64 + 32: padding it to 128 would waste a quarter of the GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...params import MLPGradRows, MLPParams, Segments
from .gelu import activate, activate_with_slope, widen
from .gemm_forward import SIZES, precision
from .gemm_tiles import Tiles, tile_rows
from .launch import cdiv, launch, next_power_of_2
from .plans import Tile
from .row_places import RowPlaces, visible_row
from .segments import segment_bounds

_LEAST = 16  # the smallest side of a GEMM's tile


def halves(width: int) -> tuple[int, int]:
    """Two powers of two whose sum is at least the width; the second is 0 if one suffices."""
    first = max(_LEAST, next_power_of_2(width))
    if first == width or width <= _LEAST:
        return first, 0
    first //= 2
    second = max(_LEAST, next_power_of_2(width - first))
    return (first, second) if second < first else (2 * first, 0)


@triton.jit(do_not_specialize=["M", "images", "rows_per_slot", "splits"])
def image_products_kernel(
    a, d, w2, g, t, offsets, rows_per_slot, M, images, splits,
    H: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """A block of hidden columns of ``g [images, splits, H, O]`` and ``t [images, splits, H]``."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks
    columns = (program % blocks).to(tl.int32) * BH + tl.arange(0, BH)
    inside = columns < H
    begin, end = segment_bounds(part // splits, offsets, rows_per_slot, M, images)
    share = tl.cdiv(end - begin, splits)
    begin = tl.minimum(begin + part % splits * share, end)
    end = tl.minimum(begin + share, end)
    r = tl.arange(0, BR)
    c0 = tl.arange(0, P0)
    acc0 = tl.zeros([BH, P0], tl.float32)
    if P1:
        c1 = P0 + tl.arange(0, P1)
        acc1 = tl.zeros([BH, P1], tl.float32)
    for row in range(begin, end, BR):
        row = tl.cast(row, tl.int64)
        valid = r < end - row
        u = tl.load(a + row * H + (r[None, :] * H + columns[:, None]), mask=valid[None, :] & inside[:, None], other=0.0)
        h = activate(widen(u), ACT, NARROW).to(d.dtype.element_ty)
        place = d + row * OUT + r[:, None] * OUT
        v = tl.load(place + c0[None, :], mask=valid[:, None] & (c0 < OUT)[None, :], other=0.0)
        acc0 = tl.dot(h, v, acc0, input_precision=PRECISION)
        if P1:
            v = tl.load(place + c1[None, :], mask=valid[:, None] & (c1 < OUT)[None, :], other=0.0)
            acc1 = tl.dot(h, v, acc1, input_precision=PRECISION)
    out = g + (part * H + columns[:, None]) * OUT
    mask = inside[:, None] & (c0 < OUT)[None, :]
    tl.store(out + c0[None, :], acc0, mask=mask)
    w = widen(tl.load(w2 + (c0[None, :] * H + columns[:, None]), mask=mask, other=0.0))
    total = tl.sum(acc0 * w, axis=1)
    if P1:
        mask = inside[:, None] & (c1 < OUT)[None, :]
        tl.store(out + c1[None, :], acc1, mask=mask)
        w = widen(tl.load(w2 + (c1[None, :] * H + columns[:, None]), mask=mask, other=0.0))
        total += tl.sum(acc1 * w, axis=1)
    tl.store(t + part * H + columns, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def hidden_backward_kernel(
    a, d, w1, w2, scale, kappa, z, rstd, da, dx, partials, M, images, each, owner, first, begin,
    patch_of_slot, grid_w, SIDE: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr,
    ONE_SCALE: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr,
):  # fmt: skip
    """A tile of rows of ``da [M, H]`` and ``dx [M, C]``, and its column sums of da, ``partials [tiles, H]``.

    O is split into P0 + P1, C into Q0 + Q1. With z (and rstd) dx is the gradient of LayerNorm's input. With
    patch_of_slot its rows are written to their places in a dense map."""
    tile = tl.program_id(0).to(tl.int64)
    image, row, rows = tile_rows(tile, M, images, each, owner, first, begin, KIND, BM)
    which = 0 if ONE_SCALE else image
    offset = tl.arange(0, BM)
    valid = (offset < rows)[:, None]
    row = tl.where(rows > 0, row, 0)
    k = tl.arange(0, BH)
    p0 = tl.arange(0, P0)
    q0 = tl.arange(0, Q0)
    d0 = tl.load(d + row * OUT + (offset[:, None] * OUT + p0[None, :]), mask=valid & (p0 < OUT)[None, :], other=0.0)
    dz0 = tl.zeros([BM, Q0], tl.float32)
    if P1:
        p1 = P0 + tl.arange(0, P1)
        d1 = tl.load(d + row * OUT + (offset[:, None] * OUT + p1[None, :]), mask=valid & (p1 < OUT)[None, :], other=0.0)
    if Q1:
        q1 = Q0 + tl.arange(0, Q1)
        dz1 = tl.zeros([BM, Q1], tl.float32)
    for k0 in range(0, H, BH):
        columns = k0 + k
        inside = columns < H
        w = tl.load(w2 + (p0[:, None] * H + columns[None, :]), mask=(p0 < OUT)[:, None] & inside[None, :], other=0.0)
        ds = tl.dot(d0, w, input_precision=PRECISION)
        if P1:
            used = (p1 < OUT)[:, None] & inside[None, :]
            w = tl.load(w2 + (p1[:, None] * H + columns[None, :]), mask=used, other=0.0)
            ds = tl.dot(d1, w, ds, input_precision=PRECISION)
        place = row * H + (offset[:, None] * H + columns[None, :])
        mask = valid & inside[None, :]
        u = tl.load(a + place, mask=mask, other=0.0)
        h, slope = activate_with_slope(widen(u), ACT, NARROW)
        s = tl.load(scale + which * H + columns, mask=inside, other=0.0)
        kap = tl.load(kappa + which * H + columns, mask=inside, other=0.0)
        grad = tl.where(mask, (ds * s[None, :] + h * kap[None, :]) * slope, 0.0)
        tl.store(partials + tile * H + columns, tl.sum(grad, axis=0), mask=inside)
        narrow = grad.to(da.dtype.element_ty)
        tl.store(da + place, narrow, mask=mask)
        v = tl.load(w1 + (columns[:, None] * C + q0[None, :]), mask=inside[:, None] & (q0 < C)[None, :], other=0.0)
        dz0 = tl.dot(narrow, v, dz0, input_precision=PRECISION)
        if Q1:
            v = tl.load(w1 + (columns[:, None] * C + q1[None, :]), mask=inside[:, None] & (q1 < C)[None, :], other=0.0)
            dz1 = tl.dot(narrow, v, dz1, input_precision=PRECISION)
    mask0 = valid & (q0 < C)[None, :]
    place = row * C + offset[:, None] * C
    if Q1:
        mask1 = valid & (q1 < C)[None, :]
    if z is not None:
        # LayerNorm's backward is affine in each row; columns beyond the width are zero in dz and z alike
        n0 = widen(tl.load(z + place + q0[None, :], mask=mask0, other=0.0))
        mean, along = tl.sum(dz0, axis=1), tl.sum(dz0 * n0, axis=1)
        if Q1:
            n1 = widen(tl.load(z + place + q1[None, :], mask=mask1, other=0.0))
            mean += tl.sum(dz1, axis=1)
            along += tl.sum(dz1 * n1, axis=1)
        r = tl.load(rstd + row + offset, mask=offset < rows, other=0.0)[:, None]
        mean, along = (mean / C)[:, None], (along / C)[:, None]
        dz0 = r * (dz0 - mean - n0 * along)
        if Q1:
            dz1 = r * (dz1 - mean - n1 * along)
    if patch_of_slot is not None:
        place = visible_row(row + offset, offset < rows, patch_of_slot, grid_w, SIDE)[:, None] * C
    tl.store(dx + place + q0[None, :], dz0.to(dx.dtype.element_ty), mask=mask0)
    if Q1:
        tl.store(dx + place + q1[None, :], dz1.to(dx.dtype.element_ty), mask=mask1)


@triton.jit(do_not_specialize=[*SIZES, "rows_per_split"])
def weight_product_kernel(
    a, d, scale, parts, owner_of_slot, M, images, each, rows_per_split,
    H: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr, ONE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BO: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of ``parts [splits, O, H] = d' (act(a) scale)`` over the rows of one split."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    program = tl.program_id(0)
    hidden = program % blocks * BH + tl.arange(0, BH)
    out = program // blocks * BO + tl.arange(0, BO)
    split = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BR)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    acc = tl.zeros([BO, BH], tl.float32)
    for row in range(begin, end, BR):
        row = tl.cast(row, tl.int64)
        valid = r < end - row
        mask = valid[:, None] & (hidden < H)[None, :]
        u = tl.load(a + row * H + (r[:, None] * H + hidden[None, :]), mask=mask, other=0.0)
        h = activate(widen(u), ACT, NARROW)
        if ONE_SCALE:
            h *= tl.load(scale + hidden, mask=hidden < H, other=0.0)[None, :]
        else:
            if owner_of_slot is None:
                image = (row + r) // each
            else:
                image = tl.load(owner_of_slot + (row + r) // each, mask=valid, other=0).to(tl.int64)
            h *= tl.load(scale + image[:, None] * H + hidden[None, :], mask=mask, other=0.0)
        place = d + row * OUT + (out[:, None] + r[None, :] * OUT)
        v = tl.load(place, mask=(out < OUT)[:, None] & valid[None, :], other=0.0)
        acc = tl.dot(v, h.to(d.dtype.element_ty), acc, input_precision=PRECISION)
    mask = (out < OUT)[:, None] & (hidden < H)[None, :]
    tl.store(parts + (split * OUT + out[:, None]) * H + hidden[None, :], acc, mask=mask)


def image_products(
    a: Tensor, act: str, d: Tensor, w2: Tensor, segments: Segments, splits: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    """``g [count, splits, H, O]`` and ``t [count, splits, H]``, to be summed over the splits of an image's rows.

    ``tile.rows`` of a step, ``tile.columns`` hidden columns; the output's width is not split."""
    (rows, hidden), out_c, count = a.shape, d.shape[1], segments.count
    g = torch.empty(count, splits, hidden, out_c, dtype=torch.float32, device=a.device)
    t = torch.empty(count, splits, hidden, dtype=torch.float32, device=a.device)
    p0, p1 = halves(out_c)
    launch(
        image_products_kernel, (count * splits * cdiv(hidden, tile.columns),),
        num_warps=tile.warps, num_stages=tile.stages,
        a=a, d=d, w2=w2, g=g, t=t, offsets=segments.offsets,
        rows_per_slot=segments.rows_per_slot, M=rows, images=count, splits=splits,
        H=hidden, OUT=out_c, ACT=act, NARROW=a.dtype == torch.bfloat16, PRECISION=precision(a.dtype),
        BH=tile.columns, BR=tile.rows, P0=p0, P1=p1,
    )  # fmt: skip
    return g, t


def hidden_backward(
    chunk: MLPGradRows, weights: MLPParams, act: str, scales: tuple[Tensor, Tensor], tiles: Tiles, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """``da [M, H]``, ``dx [M, C]``, or ``chunk.dx`` with the gradient at its places, and the sums of da by tile
    ``[tiles, H]``. ``tile.columns`` is the hidden step. ``scales``: scale and kappa."""
    a, d, (scale, kappa) = chunk.a, chunk.d, scales
    rows, hidden = a.shape
    out_c, width = d.shape[1], weights.w1.shape[1]
    da, dx = torch.empty_like(a), a.new_empty(rows, width) if chunk.dx is None else chunk.dx
    partials = torch.empty(tiles.count, hidden, dtype=torch.float32, device=a.device)
    (p0, p1), (q0, q1) = halves(out_c), halves(width)
    launch(
        hidden_backward_kernel, (tiles.count,), num_warps=tile.warps, num_stages=tile.stages,
        a=a, d=d, w1=weights.w1, w2=weights.w2, scale=scale, kappa=kappa, z=chunk.z, rstd=chunk.rstd, da=da, dx=dx,
        partials=partials, M=rows, H=hidden, C=width, OUT=out_c, ACT=act, NARROW=a.dtype == torch.bfloat16,
        ONE_SCALE=scale.shape[0] == 1, PRECISION=precision(a.dtype), BH=tile.columns,
        P0=p0, P1=p1, Q0=q0, Q1=q1, **RowPlaces.of(chunk.places).visible, **tiles.arguments,
    )  # fmt: skip
    return da, dx, partials


def weight_product(
    a: Tensor, act: str, d: Tensor, scale: Tensor, segments: Segments, splits: int, tile: Tile
) -> Tensor:
    """``parts [splits, O, H]`` of ``d' (act(a) scale)``. ``tile.rows`` output columns, ``tile.columns`` hidden ones,
    ``tile.depth`` rows of a step."""
    (rows, hidden), out_c = a.shape, d.shape[1]
    offsets, rows_per_slot, count = segments
    parts = torch.empty(splits, out_c, hidden, dtype=torch.float32, device=a.device)
    each, owners = rows // max(1, count), None
    if offsets is not None:
        slots = rows // rows_per_slot
        owners = torch.arange(count, device=a.device).repeat_interleave(offsets.diff(), output_size=slots).int()
        each = rows_per_slot
    launch(
        weight_product_kernel, (cdiv(out_c, tile.rows) * cdiv(hidden, tile.columns), splits),
        num_warps=tile.warps, num_stages=tile.stages,
        a=a, d=d, scale=scale, parts=parts, owner_of_slot=owners, M=rows, images=count, each=each,
        rows_per_split=cdiv(cdiv(rows, splits), tile.depth) * tile.depth,
        H=hidden, OUT=out_c, ACT=act, NARROW=a.dtype == torch.bfloat16, ONE_SCALE=scale.shape[0] == 1,
        PRECISION=precision(a.dtype), BO=tile.rows, BH=tile.columns, BR=tile.depth,
    )  # fmt: skip
    return parts
