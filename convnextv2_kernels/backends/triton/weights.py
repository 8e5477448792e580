"""Passes over tensors of the size of the MLP's weights, not of its rows.

They form the operands of the GEMMs (LayerNorm's affine part folded into the first weight and bias, GRN's beta into the
second bias) in one launch where plain tensor operations take six, the gradients behind them, and the second weight's
gradient from one GEMM per image.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...params import MLPParams, NormParams
from .launch import accumulator, cdiv, launch, next_power_of_2
from .reduce import add_pair


@triton.jit
def _prepare_rows(
    block, w, bias, gain, shift, w_out, bias_out, rows,
    C: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``w_out = w * gain`` and ``bias_out = bias + w shift`` of a block of the rows of ``w [rows, C]``. None: no gain,
    no shift, no such output."""
    row = tl.cast(block, tl.int64) * BM + tl.arange(0, BM)
    valid = row < rows
    dot = tl.zeros([BM, BC], ACC)
    for first in range(0, C, BC):
        columns = first + tl.arange(0, BC)
        held = columns < C
        inside = valid[:, None] & held[None, :]
        place = (row * C)[:, None] + columns[None, :]
        value = tl.load(w + place, mask=inside, other=0.0).to(ACC)
        if shift is not None:
            dot += value * tl.load(shift + columns, mask=held, other=0.0).to(ACC)[None, :]
        if gain is not None:
            value *= tl.load(gain + columns, mask=held, other=0.0).to(ACC)[None, :]
        if w_out is not None:
            tl.store(w_out + place, value.to(w_out.dtype.element_ty), mask=inside)
    if bias_out is not None:
        result = tl.load(bias + row, mask=valid, other=0.0).to(ACC) + tl.sum(dot, axis=1)
        tl.store(bias_out + row, result.to(bias_out.dtype.element_ty), mask=valid)


@triton.jit
def mlp_parameters_kernel(
    w1, b1, w2, b2, beta, gain, shift, w1_out, b1_out, w2_out, b2_out,
    C: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Rows of the first weight ``[H, C]``, then rows of the second ``[OUT, H]``."""
    block = tl.program_id(0)
    first: tl.constexpr = (H + BM - 1) // BM
    if block < first:
        _prepare_rows(block, w1, b1, gain, shift, w1_out, b1_out, H, C, ACC, BM, BC)
    else:
        _prepare_rows(block - first, w2, b2, None, beta, w2_out, b2_out, OUT, H, ACC, BM, BH)


def mlp_parameters(params: MLPParams, layer_norm: NormParams | None, like: Tensor) -> MLPParams:
    """``w1 [H, C]``, ``b1 [H]``, ``w2 [O, H]``, ``b2 [O]`` or None, ``beta [H]`` and LN's weight and bias ``[C]``, of
    any float dtype, -> ``w1 * gain``, ``b1 + w1 shift``, w2, ``b2 + w2 beta`` in the dtype of ``like``. A weight that
    would not change is returned itself."""
    w1, b1, gamma, beta, w2, b2 = params
    (hidden, width), out = w1.shape, w2.shape[0]
    gain, shift = (None, None) if layer_norm is None else (t.contiguous() for t in layer_norm)
    w1, b1, w2, beta = (t.contiguous() for t in (w1, b1, w2, beta))
    w1_out = like.new_empty(w1.shape) if w1.dtype != like.dtype or layer_norm is not None else None
    w2_out = like.new_empty(w2.shape) if w2.dtype != like.dtype else None
    b1_out = like.new_empty(hidden)
    b2_out = None if b2 is None else like.new_empty(out)
    rows = 4
    launch(
        mlp_parameters_kernel, (cdiv(hidden, rows) + cdiv(out, rows),),
        w1=w1, b1=b1, w2=w2, b2=None if b2 is None else b2.contiguous(), beta=None if b2 is None else beta,
        gain=gain, shift=shift,
        w1_out=w1_out, b1_out=b1_out, w2_out=w2_out, b2_out=b2_out,
        C=width, H=hidden, OUT=out, ACC=accumulator(like.dtype),
        BM=rows, BC=min(512, next_power_of_2(width)), BH=min(512, next_power_of_2(hidden)),
    )  # fmt: skip
    w1, w2 = (w1 if w1_out is None else w1_out), (w2 if w2_out is None else w2_out)
    return MLPParams(w1, b1_out, gamma, params.beta, w2, b2_out)


@triton.jit
def unfold_layer_norm_kernel(
    w1, gain, shift, dw1, db1, partials, splits,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``dw1 * gain + outer(db1, shift)`` in place, and ``partials [2, splits, C]`` of ``w1 * dw1`` and ``w1 * db1``
    over ROWS rows each."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    split = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    held = columns < C
    g = tl.load(gain + columns, mask=held, other=0.0).to(ACC)[None, :]
    s = tl.load(shift + columns, mask=held, other=0.0).to(ACC)[None, :]
    dgain = tl.zeros([BM, BC], ACC)
    dshift = tl.zeros([BM, BC], ACC)
    for first in range(0, ROWS, BM):
        row = tl.cast(split, tl.int64) * ROWS + first + tl.arange(0, BM)
        inside = (row < H)[:, None] & held[None, :]
        place = (row * C)[:, None] + columns[None, :]
        w = tl.load(w1 + place, mask=inside, other=0.0).to(ACC)
        d = tl.load(dw1 + place, mask=inside, other=0.0)
        b = tl.load(db1 + row, mask=row < H, other=0.0).to(ACC)[:, None]
        dgain += w * d
        dshift += w * b
        tl.store(dw1 + place, d * g + b * s, mask=inside)
    out = partials + tl.cast(split, tl.int64) * C + columns
    tl.store(out, tl.sum(dgain, axis=0), mask=held)
    tl.store(out + tl.cast(splits, tl.int64) * C, tl.sum(dshift, axis=0), mask=held)


def unfold_layer_norm(w1: Tensor, layer_norm: NormParams, dw1: Tensor, db1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients ``dw1 A[H, C]`` and ``db1 A[H]`` of ``w1 * gain`` and ``b1 + w1 shift`` those of w1, in place,
    gain and shift ``A[C]``. w1 ``[H, C]``, gain and shift of any float dtype."""
    hidden, width = w1.shape
    w1, dw1, db1, gain, shift = (t.contiguous() for t in (w1, dw1, db1, *layer_norm))
    rows, block = 64, 64
    splits = cdiv(hidden, rows)
    partials = dw1.new_empty(2, splits, width)
    launch(
        unfold_layer_norm_kernel, (splits * cdiv(width, block),),
        w1=w1, gain=gain, shift=shift, dw1=dw1, db1=db1, partials=partials, splits=splits,
        H=hidden, C=width, ROWS=rows, ACC=accumulator(dw1.dtype), BM=16, BC=block,
    )  # fmt: skip
    return dw1, *add_pair(partials)


@triton.jit(do_not_specialize=["images"])
def products_weight_kernel(
    g, scale, d_sum, beta, out, images,
    OUT: tl.constexpr, H: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_H: tl.constexpr,
    ACC: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """A block of ``out [OUT, H]``, BI images at a time."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    o = tl.program_id(0) // blocks * BO + tl.arange(0, BO)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    n = tl.arange(0, BI)
    inside = (o < OUT)[:, None] & (h < H)[None, :]
    source = g + n.to(tl.int64)[:, None, None] * STRIDE_N + (o[:, None] * STRIDE_O + h[None, :] * STRIDE_H)[None, :, :]
    total = tl.zeros([BI, BO, BH], ACC)
    for first in range(0, images, BI):
        there = n < images - first
        value = tl.load(source, mask=there[:, None, None] & inside[None, :, :], other=0.0)
        at = tl.cast(first, tl.int64) * H + (n[:, None] * H + h[None, :])
        factor = tl.load(scale + at, mask=there[:, None] & (h < H)[None, :], other=0.0)
        total += value * factor[:, None, :]
        source += BI * STRIDE_N
    d = tl.load(d_sum + o, mask=o < OUT, other=0.0)[:, None]
    b = tl.load(beta + h, mask=h < H, other=0.0)[None, :]
    tl.store(out + (o[:, None] * H + h[None, :]), tl.sum(total, axis=0) + d * b, mask=inside)


def products_weight(g: Tensor, scale: Tensor, d_sum: Tensor, beta: Tensor) -> Tensor:
    """``sum over n of g[n] * scale[n] + outer(d_sum, beta)``: ``g A[N, O, H]`` of any strides, ``scale A[N, H]``,
    ``d_sum A[O]``, ``beta A[H]`` -> ``A[O, H]``."""
    images, out_c, hidden = g.shape
    out = g.new_empty(out_c, hidden)
    strides = g.stride()
    # the tile is long where memory is contiguous, and small because these GEMMs are few and small
    block = (8, 32) if strides[2] == 1 else (32, 8)
    launch(
        products_weight_kernel, (cdiv(out_c, block[0]) * cdiv(hidden, block[1]),),
        g=g, scale=scale, d_sum=d_sum, beta=beta, out=out, images=images,
        OUT=out_c, H=hidden, STRIDE_N=strides[0], STRIDE_O=strides[1], STRIDE_H=strides[2],
        ACC=accumulator(g.dtype), BI=8, BO=block[0], BH=block[1],
    )  # fmt: skip
    return out


@triton.jit
def products_reduce_kernel(
    g, w2, t, OUT: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr, BO: tl.constexpr, BH: tl.constexpr
):
    """A block of columns of ``t [images, H]`` for one image."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    image = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    total = tl.zeros([BO, BH], ACC)
    for first in range(0, OUT, BO):
        o = first + tl.arange(0, BO)
        inside = (o < OUT)[:, None] & (h < H)[None, :]
        place = o[:, None] * H + h[None, :]
        value = tl.load(g + image * (OUT * H) + place, mask=inside, other=0.0)
        total += value * tl.load(w2 + place, mask=inside, other=0.0).to(ACC)
    tl.store(t + image * H + h, tl.sum(total, axis=0), mask=h < H)


def products_reduce(g: Tensor, w2: Tensor) -> Tensor:
    """``sum over o of g[n, o] * w2[o]``: ``g A[N, O, H]`` contiguous, w2 ``[O, H]`` -> ``A[N, H]``."""
    images, out_c, hidden = g.shape
    t = g.new_empty(images, hidden)
    block = min(128, next_power_of_2(hidden))
    launch(
        products_reduce_kernel, (images * cdiv(hidden, block),), g=g, w2=w2.contiguous(), t=t,
        OUT=out_c, H=hidden, ACC=accumulator(g.dtype), BO=8, BH=block,
    )  # fmt: skip
    return t
