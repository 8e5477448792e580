"""Depthwise K x K convolution of dense maps and of packed patches, and the same with LayerNorm.

A program owns a tile of runs (``conv_addressing.py``) x channels, with one accumulator per pixel of a run. For each of
the K rows of taps it reads RUN + K - 1 pixels and K weights. For K = 7, runs of 8 and bfloat16, an output costs 49
multiply-adds, 12.3 input values and 6.1 weights: 49 bytes from L1, where a program that reads every tap reads 98 for
input alone. The compiled loop has 1.8 instructions per multiply-add, 89 per value (float32: 74), so it is bound by
instruction issue. By count, not by measurement, that is about twice the time of a copy of the map for bfloat16, and the
time of a copy for float32. The shorter runs of patches of side 4, 2 and 1 cost 115, 150 and 229 instructions; their
tiles have more runs, or longer vectors of channels, to share the weights.

A hidden pixel costs no load, but its multiply-adds run: a program knows hidden pixels only as a mask over its runs, and
smaller programs, which could skip them, would not share lines of x in L1. The CUDA backend skips hidden pixels.

The gradient of x uses the same kernel with the taps flipped: the neighbour relation is symmetric.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import statistics_dtype
from .conv_addressing import Geometry, place_of, source_line, source_pixel
from .gelu import widen
from .launch import accumulator, cdiv, launch, next_power_of_2, operator
from .norm import layer_norm_forward

# the widest rows whose LayerNorm is fused: 8 warps with four channels a thread
_MOST_FUSED = 1024


@triton.jit
@no_type_check  # tuples grow in Triton's loops
def conv_kernel(
    x, neighbours, weight, bias, residual, ln_weight, ln_bias, out, rstd,
    runs, height, width, groups, lines,
    C: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr, RADIUS: tl.constexpr, RUN: tl.constexpr, EXACT: tl.constexpr,
    FLIP: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) * BM + tl.arange(0, BM)
    there = run < runs
    owner, y, first, row = place_of(run, height, width, groups, SIDE, RUN)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    inside = columns < C
    if bias is not None:
        start = tl.load(bias + columns, mask=inside, other=0.0) + tl.zeros((BM, BC), ACC)
    else:
        start = tl.zeros((BM, BC), ACC)
    # wide rows of weights are read as a tile: a vector would be spread over all threads and exchanged at every tap
    spread = columns + tl.zeros((BM, BC), tl.int32) if NORMALIZE else columns
    sums = ()
    for _ in tl.static_range(RUN):
        sums += (start,)

    # lines is K: for AMD the compiler unrolls a constant count until registers spill
    for ky in range(lines):
        line, seen, inner = source_line(x, neighbours, owner, y + (ky - K // 2), there, height, width, C, SIDE, RADIUS)
        line_of_taps = weight + (K - 1 - ky if FLIP else ky) * (K * C) + spread
        taps = ()
        for kx in tl.static_range(K):
            taps += (tl.load(line_of_taps + (K - 1 - kx if FLIP else kx) * C, mask=spread < C, other=0.0),)
        for j in tl.static_range(RUN + K - 1):
            source, visible = source_pixel(
                x, line, seen, inner, first, width, columns, j - K // 2, C, SIDE, RADIUS, RUN
            )
            value = widen(tl.load(source, mask=visible[:, None] & inside, other=0.0))
            added = ()
            for q in tl.static_range(RUN):
                if q <= j and j - q < K:
                    added += (sums[q] + value * taps[j - q],)
                else:
                    added += (sums[q],)
            sums = added

    start = (row * C)[:, None] + columns
    if NORMALIZE and ln_weight is not None:
        gain = tl.load(ln_weight + columns, mask=inside, other=0.0)
    if NORMALIZE and ln_bias is not None:
        shift = tl.load(ln_bias + columns, mask=inside, other=0.0)
    for q in tl.static_range(RUN):
        value = sums[q]
        stored = there
        if not EXACT:
            stored = there & (first + q < width)
        at = start + q * C
        mask = stored[:, None] & inside
        if NORMALIZE:
            mean = tl.sum(value, axis=1) / C
            value = tl.where(inside, value - mean[:, None], 0.0)
            inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / C + EPS)
            tl.store(rstd + row + q, inverse, mask=stored)
            value = value * inverse[:, None]
            if ln_weight is not None:
                value = value * gain
            if ln_bias is not None:
                value = value + shift
        if residual is not None:
            value += widen(tl.load(residual + at, mask=mask, other=0.0))
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


class _Norm(NamedTuple):
    """LayerNorm after the convolution, whose 1/std goes into ``rstd``; none where that is None."""

    rstd: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


_NO_NORM = _Norm(None, None, None, 0.0)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor | None, out: Tensor, *,
    residual: Tensor | None = None, flip: bool = False, norm: _Norm = _NO_NORM,
) -> None:  # fmt: skip
    """Convolution of x into ``out``, a tensor of x's shape, or its LayerNorm."""
    c, k = weight.shape[0], weight.shape[-1]
    rstd = norm.rstd
    geometry = Geometry(x, neighbours, k)
    bc = min(64, next_power_of_2(c)) if rstd is None else next_power_of_2(c)
    num_warps = 4 if bc <= 64 else 8
    # channels per thread, 8 to 16 bytes of each pixel of its run
    vector = 2 if x.dtype == torch.float64 else 8 if geometry.run < 4 and x.element_size() == 2 else 4
    bm = max(1, min(32 * num_warps * vector // bc, 64))
    launch(
        conv_kernel,
        (cdiv(geometry.runs, bm), cdiv(c, bc)),
        num_warps=num_warps,
        x=x,
        neighbours=neighbours,
        # by taps, so that the weights of neighbouring channels are adjacent
        weight=weight.view(c, k * k).t().contiguous(),
        bias=bias,
        residual=residual,
        ln_weight=norm.weight,
        ln_bias=norm.bias,
        out=out,
        rstd=rstd,
        lines=k,
        **geometry.sizes,
        **geometry.constants,
        FLIP=flip,
        NORMALIZE=rstd is not None,
        EPS=norm.eps,
        ACC=accumulator(x.dtype),
        BM=bm,
        BC=bc,
    )


@operator
def depthwise_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, neighbours: Tensor | None, flip: bool
) -> Tensor:
    """Convolution of ``x``, ``[maps, H, W, C]`` or packed ``[P, s, s, C]`` with ``neighbours [P, (2r+1)^2]`` int32, by
    ``weight A[C, 1, K, K]``, rotated by 180 degrees with ``flip``; ``bias A[C]`` and ``residual``, like x, are added
    before the result is rounded to x's dtype."""
    y = torch.empty_like(x)
    _convolve(x, weight, bias, neighbours, y, residual=residual, flip=flip)
    return y


@operator
def depthwise_conv_normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor | None, ln_weight: Tensor | None,
    ln_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """LayerNorm over the channels of the convolution, like x, and ``rstd A[maps, H, W]``; statistics are those of the
    sums before they are rounded. One launch up to 1024 channels; above, through a buffer in A."""
    stat = statistics_dtype(x.dtype)
    if x.shape[-1] > _MOST_FUSED:
        buffer = torch.empty_like(x, dtype=stat)
        _convolve(x, weight, bias, neighbours, buffer)
        y, _, rstd = layer_norm_forward(buffer, ln_weight, ln_bias, eps)
        return y.to(x.dtype), rstd
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=stat)
    _convolve(x, weight, bias, neighbours, y, norm=_Norm(rstd, ln_weight, ln_bias, eps))
    return y, rstd
