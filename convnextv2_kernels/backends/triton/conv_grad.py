"""Gradients of the depthwise convolution's weight and bias.

A program owns a share of the runs (``conv_addressing.py``) and a block of channels. The rows of its tile are the K
lines of taps, with one accumulator per tap of a line: a thread keeps its own sums from first to last run, and no sum
crosses threads. Per run it reads RUN values of the gradient, the same for all lines of taps, and RUN + K - 1 pixels for
RUN * K multiply-adds. The lines of taps read neighbouring lines of x, which L1 keeps for the next runs, so that beyond
it grad moves about once and x about twice. For K = 7, runs of 8 and bfloat16 a value costs 56 multiply-adds (the tile
has 8 lines) and 118 instructions, 218 and 304 in patches of side 2 and 1.

The tile's spare line, there because K is odd and tiles are powers of two, sees the pixel 1 everywhere: its sums are
the gradient of the bias. Shares are added in order by a second kernel; their number depends on shapes alone.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import statistics_dtype
from .conv_addressing import Geometry, place_of, source_line, source_pixel
from .gelu import widen
from .launch import accumulator, cdiv, launch, next_power_of_2, operator

_PROGRAMS = 512  # enough for the largest GPUs; the workspace grows with their number
_LEAST_RUNS = 16  # per program, so that it writes far fewer sums than it reads values


@triton.jit
@no_type_check  # tuples grow in Triton's loops
def weight_grad_kernel(
    grad, x, neighbours, partial,
    runs, share, height, width, groups,
    C: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr, RADIUS: tl.constexpr, RUN: tl.constexpr, EXACT: tl.constexpr,
    ACC: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    ky = tl.arange(0, BK)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    inside = columns < C
    # the value of a pixel that is not read: 1 in the spare line, else 0
    blank = (tl.where(ky == K, 1.0, 0.0)[:, None] + tl.zeros((BK, BC), tl.float32)).to(x.dtype.element_ty)
    sums = ()
    for _ in tl.static_range(K):
        sums += (tl.zeros((BK, BC), ACC),)

    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, runs)
    for step in range(begin, end, UNROLL):
        for u in tl.static_range(UNROLL):
            run = step + u + tl.zeros((1,), tl.int32)  # a tensor of one: the interpreter broadcasts no scalar masks
            there = run < end
            owner, y, first, row = place_of(run, height, width, groups, SIDE, RUN)
            line, seen, inner = source_line(
                x, neighbours, owner, y + ky - K // 2, there & (ky < K), height, width, C, SIDE, RADIUS
            )
            own = (grad + row * C)[:, None] + columns
            slopes = ()
            for q in tl.static_range(RUN):
                stored = there
                if not EXACT:
                    stored = there & (first + q < width)
                slopes += (widen(tl.load(own + q * C, mask=stored[:, None] & inside, other=0.0)),)
            for j in tl.static_range(RUN + K - 1):
                source, visible = source_pixel(
                    x, line, seen, inner, first, width, columns, j - K // 2, C, SIDE, RADIUS, RUN
                )
                value = widen(tl.load(source, mask=visible[:, None] & inside, other=blank))
                added = ()
                for kx in tl.static_range(K):
                    if kx <= j and j - kx < RUN:
                        added += (sums[kx] + value * slopes[j - kx],)
                    else:
                        added += (sums[kx],)
                sums = added

    base = partial + tl.cast(tl.program_id(0), tl.int64) * ((K * K + 1) * C)
    for kx in tl.static_range(K):
        # the spare line once, after the taps
        tap = tl.where(ky < K, ky * K + kx, K * K)
        kept = (ky < K) if kx > 0 else (ky <= K)
        tl.store(base + tap[:, None] * C + columns, sums[kx], mask=kept[:, None] & inside)


@triton.jit
def add_shares_kernel(
    partial, dweight, dbias, splits, channels,
    TAPS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    count = (TAPS + 1) * channels
    inside = columns < count
    sums = tl.zeros((BM, BC), ACC)
    for row in range(0, splits, BM):
        rows = row + tl.arange(0, BM)
        at = tl.cast(rows, tl.int64)[:, None] * count + columns[None, :]
        sums += tl.load(partial + at, mask=(rows < splits)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    tap = columns // channels
    channel = columns - tap * channels
    tl.store(dweight + channel * TAPS + tap, total, mask=inside & (tap < TAPS))
    tl.store(dbias + channel, total, mask=inside & (tap == TAPS))


@operator
def depthwise_conv_backward_weight(
    grad: Tensor, x: Tensor, neighbours: Tensor | None, kernel_size: int
) -> tuple[Tensor, Tensor]:
    """``dweight A[C, 1, K, K]`` and ``dbias A[C]``, the column sums of ``grad``, which is like ``x [maps, H, W, C]`` or
    packed ``[P, s, s, C]`` with ``neighbours [P, (2r+1)^2]`` int32."""
    geometry = Geometry(x, neighbours, kernel_size)
    c, taps = x.shape[-1], kernel_size * kernel_size
    bk = next_power_of_2(kernel_size + 1)
    bc = min(32 if x.dtype == torch.float64 or bk > 8 else 64, next_power_of_2(c))
    blocks = cdiv(c, bc)
    splits = max(1, min(cdiv(geometry.runs, _LEAST_RUNS), cdiv(_PROGRAMS, blocks)))
    stat = statistics_dtype(x.dtype)
    dweight = x.new_empty((c, 1, kernel_size, kernel_size), dtype=stat)
    dbias = x.new_empty(c, dtype=stat)
    partial = x.new_empty((splits, taps + 1, c), dtype=stat)
    acc = accumulator(x.dtype)
    launch(
        weight_grad_kernel,
        (splits, blocks),
        grad=grad,
        x=x,
        neighbours=neighbours,
        partial=partial,
        share=cdiv(geometry.runs, splits),
        **geometry.sizes,
        **geometry.constants,
        ACC=acc,
        BK=bk,
        BC=bc,
        UNROLL=max(1, 4 // geometry.run),
    )
    launch(
        add_shares_kernel,
        (cdiv((taps + 1) * c, 64),),
        partial=partial,
        dweight=dweight,
        dbias=dbias,
        splits=splits,
        channels=c,
        TAPS=taps,
        ACC=acc,
        BM=16,
        BC=64,
    )
    return dweight, dbias
