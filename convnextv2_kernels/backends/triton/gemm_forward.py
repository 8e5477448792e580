"""The two GEMMs of the MLP's forward pass, fused with the operations before and after them.

They exchange one hidden tensor, written once and read once; vendor GEMMs with element-wise passes write it twice and
read it three times:

* the first GEMM adds its bias, applies the activation, sums the squares of each image's rows for GRN, and stores the
  activations h, or a itself if backward needs it;
* the second scales them in its prologue (from a it applies the activation again), and adds bias, ``W2 beta``, drop path
  and the residual in its epilogue.

Neighbouring programs share a tile of rows and process consecutive columns, so that rows come from the cache, and the
weights, which fit into it, stay there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...params import MLPParams, MLPRows
from . import plans
from .gelu import activate, widen
from .gemm_tiles import Tiles, image_sums, tile_rows
from .launch import cdiv, launch
from .plans import Tile
from .row_places import RowPlaces, visible_row

# sizes that change between calls: kernels are not recompiled for each
SIZES = ["M", "images", "each"]
# up to this many images in a tile are summed one after the other, more by one GEMM
_FEW_IMAGES = 3


@triton.jit
def _store_image_sums(
    squares, row, rows, tile, partials, columns, inside, each, W: tl.constexpr,
    SPAN: tl.constexpr, FEW: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column sums ``[tile, SPAN, W]`` of the rows of each image that a tile spans; rows beyond its last are zero."""
    base = partials + tl.cast(tile, tl.int64) * (SPAN * W) + columns
    if SPAN == 1:
        tl.store(base, tl.sum(squares, axis=0), mask=inside)
    else:
        offset = tl.arange(0, BM)
        image = (row + offset) // each - row // each
        if SPAN <= FEW:
            for i in tl.static_range(SPAN):
                mine = tl.sum(tl.where((image == i)[:, None], squares, 0.0), axis=0)
                tl.store(base + i * W, mine, mask=inside)
        else:
            span = tl.arange(0, 16)
            chosen = tl.where(span[:, None] == image[None, :], 1.0, 0.0)
            # three GEMMs of tf32 parts, or float32: a single tf32 GEMM would lose the precision that these sums need
            sums = tl.dot(chosen, squares, input_precision=PRECISION)
            out = base[None, :] + span[:, None] * W
            tl.store(out, sums, mask=inside[None, :] & (span < SPAN)[:, None])


@triton.jit(do_not_specialize=SIZES)
def first_product_kernel(
    y, w1, b1, out, partials, M, images, each, owner, first, begin, patch_of_slot, grid_w,
    SIDE: tl.constexpr, C: tl.constexpr, H: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr, KEEP: tl.constexpr,
    KIND: tl.constexpr, SPAN: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out [M, H]`` = a, or act(a) unless KEEP, of ``a = y [M, C] w1 [H, C]' + b1``; sums of act(a)^2 per image. With
    patch_of_slot the rows of y are the visible ones of a dense map."""
    blocks: tl.constexpr = (H + BN - 1) // BN
    program = tl.program_id(0).to(tl.int64)
    tile = program // blocks
    _image, row, rows = tile_rows(tile, M, images, each, owner, first, begin, KIND, BM)
    if rows > 0:
        columns = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
        inside = columns < H
        offset = tl.arange(0, BM)
        valid = offset < rows
        k = tl.arange(0, BK)
        if patch_of_slot is None:
            left = y + row * C + (offset[:, None] * C + k[None, :])
        else:
            left = y + (visible_row(row + offset, valid, patch_of_slot, grid_w, SIDE)[:, None] * C + k[None, :])
        right = w1 + (columns[None, :] * C + k[:, None])
        acc = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, C, BK):
            if C % BK == 0:
                u = tl.load(left + k0, mask=valid[:, None], other=0.0)
                v = tl.load(right + k0, mask=inside[None, :], other=0.0)
            else:
                u = tl.load(left + k0, mask=valid[:, None] & (k0 + k < C)[None, :], other=0.0)
                v = tl.load(right + k0, mask=inside[None, :] & (k0 + k < C)[:, None], other=0.0)
            acc = tl.dot(u.to(w1.dtype.element_ty), v, acc, input_precision=PRECISION)
        a = acc + widen(tl.load(b1 + columns, mask=inside, other=0.0))[None, :]
        # backward starts from the stored a, and so do the sums
        a = a.to(out.dtype.element_ty)
        h = activate(widen(a), ACT, NARROW)
        place = out + row * H + (offset[:, None] * H + columns[None, :])
        stored = a if KEEP else h.to(out.dtype.element_ty)
        tl.store(place, stored, mask=valid[:, None] & inside[None, :])
        h = tl.where(valid[:, None], h, 0.0)  # after the activation: act(b1) is not zero
        _store_image_sums(h * h, row, rows, tile, partials, columns, inside, each, H, SPAN, FEW, BM, SUMS)


@triton.jit(do_not_specialize=SIZES)
def second_product_kernel(
    a, w2, b2, scale, residual, factors, out, M, images, each, owner, first, begin,
    H: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr, ONE_SCALE: tl.constexpr,
    KIND: tl.constexpr, SPAN: tl.constexpr, FEW: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out [M, O] = residual + factor * ((act(a) scale) w2 [O, H]' + b2)``; ``scale [images, H]``, or ``[1, H]`` for
    all images with ONE_SCALE."""
    blocks: tl.constexpr = (OUT + BN - 1) // BN
    program = tl.program_id(0).to(tl.int64)
    tile = program // blocks
    image, row, rows = tile_rows(tile, M, images, each, owner, first, begin, KIND, BM)
    if rows > 0:
        columns = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
        inside = columns < OUT
        offset = tl.arange(0, BM)
        valid = offset < rows
        owners = image
        if KIND == "flat":
            owners = tl.minimum((row + offset) // each, images - 1).to(tl.int32)
        k = tl.arange(0, BK)
        left = a + row * H + (offset[:, None] * H + k[None, :])
        right = w2 + (columns[None, :] * H + k[:, None])
        acc = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, H, BK):
            deep = k0 + k < H
            if H % BK == 0:
                u = tl.load(left + k0, mask=valid[:, None], other=0.0)
                v = tl.load(right + k0, mask=inside[None, :], other=0.0)
            else:
                u = tl.load(left + k0, mask=valid[:, None] & deep[None, :], other=0.0)
                v = tl.load(right + k0, mask=inside[None, :] & deep[:, None], other=0.0)
            h = activate(widen(u), ACT, NARROW)
            if KIND == "flat" and not ONE_SCALE:
                if SPAN <= FEW:
                    # a vector per image: a gathered float32 tile would take three times the operand's shared memory
                    for i in tl.static_range(SPAN):
                        which = tl.minimum(image + i, images - 1)
                        s = tl.load(scale + which * H + k0 + k, mask=deep, other=0.0)[None, :]
                        h = tl.where((owners == image + i)[:, None], h * s, h)
                else:
                    h *= tl.load(scale + (owners[:, None] * H + (k0 + k)[None, :]), mask=deep[None, :], other=0.0)
            else:
                which = 0 if ONE_SCALE else image
                h *= tl.load(scale + which * H + k0 + k, mask=deep, other=0.0)[None, :]
            acc = tl.dot(h.to(w2.dtype.element_ty), v, acc, input_precision=PRECISION)
        result = acc + widen(tl.load(b2 + columns, mask=inside, other=0.0))[None, :]
        if factors is not None:
            f = widen(tl.load(factors + owners))
            result *= f[:, None] if KIND == "flat" else f
        mask = valid[:, None] & inside[None, :]
        place = row * OUT + (offset[:, None] * OUT + columns[None, :])
        if residual is not None:
            result += widen(tl.load(residual + place, mask=mask, other=0.0))
        tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)


def precision(dtype: torch.dtype) -> str:
    """Precision of float32 operands according to PyTorch's own setting; 16-bit operands are used as they are."""
    if dtype == torch.float32 and plans.has_tf32() and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def first_product(
    rows: MLPRows, weights: MLPParams, act: str, out: Tensor, preserve_a: bool, tiles: Tiles, tile: Tile
) -> Tensor:
    """Writes ``out [M, H]``, a or act(a), of ``rows.x [M, C]`` or of its rows at ``rows.places``; returns the sums of
    squares ``[images, H]`` in float32."""
    hidden, width = weights.w1.shape
    partials = torch.empty(tiles.count, tiles.span, hidden, dtype=torch.float32, device=out.device)
    launch(
        first_product_kernel, (tiles.count * cdiv(hidden, tile.columns),),
        num_warps=tile.warps, num_stages=tile.stages,
        y=rows.x, w1=weights.w1, b1=weights.b1, out=out, partials=partials, M=rows.total, C=width, H=hidden,
        ACT=act, NARROW=out.dtype == torch.bfloat16, KEEP=preserve_a, FEW=_FEW_IMAGES,
        PRECISION=precision(out.dtype), SUMS="tf32x3" if plans.has_tf32() else "ieee",
        BN=tile.columns, BK=tile.depth, **RowPlaces.of(rows.places).visible, **tiles.arguments,
    )  # fmt: skip
    return image_sums(partials, tiles, rows.total)


def second_product(
    a: Tensor, act: str, weights: MLPParams, scale: Tensor, rows: MLPRows, tiles: Tiles, tile: Tile
) -> Tensor:
    """``[M, O]`` in the rows' dtype of results, from a, or from activations with ``act`` "none"."""
    (count, hidden), out_c = a.shape, weights.w2.shape[0]
    out = a.new_empty(count, out_c, dtype=rows.out_dtype)
    launch(
        second_product_kernel, (tiles.count * cdiv(out_c, tile.columns),),
        num_warps=tile.warps, num_stages=tile.stages,
        a=a, w2=weights.w2, b2=weights.b2, scale=scale, residual=rows.residual, factors=rows.drop_path_scale,
        out=out, M=count, H=hidden, OUT=out_c, ACT=act, NARROW=a.dtype == torch.bfloat16, ONE_SCALE=scale.shape[0] == 1,
        FEW=_FEW_IMAGES, PRECISION=precision(a.dtype), BN=tile.columns, BK=tile.depth, **tiles.arguments,
    )  # fmt: skip
    return out
