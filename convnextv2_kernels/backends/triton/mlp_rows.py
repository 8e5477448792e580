"""GELU and GRN on the rows of a hidden tensor ``[M, H]`` in segments, between the MLP's GEMMs.

Contracts: ``backends/base.py``. Bandwidth-bound. Bytes per 16-bit element: statistics 2, or 4 where h is stored;
scaling 4; t 4; the backward pass 8, or 6 without hs. Passes are partitioned as in ``reduce.py``: a program stays in
one segment and one block of columns, so that scale and kappa are read once and kept. Quantities that need a mean over H
are computed by one program per segment, which goes through the columns in blocks, twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import statistics_dtype
from ...params import Segments
from .gelu import activate, activate_with_slope, widen
from .launch import accumulator, launch, next_power_of_2
from .reduce import SIZES, add_partials, part_and_columns, part_rows, partial_sums, row_pass

_READ_BY_ONE = 32768  # partial sums of a segment that a single program adds


@triton.jit
def added_parts(source, stride, parts, columns, held, ACC: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr):
    """Sums of the parts, ``stride`` apart, ``[BH]``."""
    part = tl.arange(0, BP)
    total = tl.zeros([BP, BH], ACC)
    for first in range(0, parts, BP):
        at = (first + part) * stride
        inside = (first + part < parts)[:, None] & held[None, :]
        total += tl.load(source + (at[:, None] + columns[None, :]), mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["parts"])
def finish_statistics_kernel(
    squares, gamma, norm, scale, parts,
    H: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """From ``squares [count, parts, H]``: ``norm = sqrt(sum)``, ``scale = 1 + gamma norm / (mean(norm) + eps)``."""
    segment = tl.program_id(0).to(tl.int64)
    source = squares + segment * parts * H
    norm += segment * H
    scale += segment * H
    total = tl.zeros([BH], ACC)
    for first in range(0, H, BH):
        columns = first + tl.arange(0, BH)
        held = columns < H
        value = tl.sqrt(added_parts(source, H, parts, columns, held, ACC, BP, BH))
        tl.store(norm + columns, value, mask=held)
        total += value
    mean = tl.sum(total, axis=0) / H + EPS
    tl.debug_barrier()  # norm is read back by other threads
    for first in range(0, H, BW):
        columns = first + tl.arange(0, BW)
        held = columns < H
        response = tl.load(norm + columns, mask=held, other=0.0) / mean
        tl.store(scale + columns, 1.0 + tl.load(gamma + columns, mask=held, other=0.0) * response, mask=held)


@triton.jit(do_not_specialize=["parts", "count"])
def finish_gradient_kernel(
    sums, norm, gamma, scale, kappa, terms, parts, count,
    H: tl.constexpr, PAIR: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BP: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """From t, ``sums [count, parts, H]``: scale, kappa and the terms of dgamma. PAIR: ``sums [count, parts, 2, H]`` and
    ``terms [2, count, H]``, the other sums being added up for dbeta. kappa keeps t until the means are known."""
    segment = tl.program_id(0).to(tl.int64)
    stride: tl.constexpr = 2 * H if PAIR else H
    source = sums + segment * parts * stride
    norm += segment * H
    scale += segment * H
    kappa += segment * H
    terms += segment * H
    total = tl.zeros([BH], ACC)
    dot = tl.zeros([BH], ACC)
    for first in range(0, H, BH):
        columns = first + tl.arange(0, BH)
        held = columns < H
        t = added_parts(source, stride, parts, columns, held, ACC, BP, BH)
        tl.store(kappa + columns, t, mask=held)
        value = tl.load(norm + columns, mask=held, other=0.0)
        total += value
        dot += tl.load(gamma + columns, mask=held, other=0.0) * t * value
        if PAIR:
            other = added_parts(source + H, stride, parts, columns, held, ACC, BP, BH)
            tl.store(terms + tl.cast(count, tl.int64) * H + columns, other, mask=held)
    mean = tl.sum(total, axis=0) / H + EPS
    pull = tl.sum(dot, axis=0) / H / mean / mean
    tl.debug_barrier()
    for first in range(0, H, BW):
        columns = first + tl.arange(0, BW)
        held = columns < H
        t = tl.load(kappa + columns, mask=held, other=0.0)
        value = tl.load(norm + columns, mask=held, other=0.0)
        weight = tl.load(gamma + columns, mask=held, other=0.0)
        response = value / mean
        tl.store(terms + columns, response * t, mask=held)
        tl.store(scale + columns, 1.0 + weight * response, mask=held)
        pulled = (weight * t / mean - pull) / tl.where(value != 0, value, 1.0)
        tl.store(kappa + columns, tl.where(value != 0, pulled, 0.0), mask=held)


def finisher(parts: Tensor, channels: int) -> tuple[Tensor, dict]:
    """``[count, parts, W]`` with so few parts that a segment's one program can add them, and that program's tiles."""
    if parts.shape[1] * parts.shape[2] > _READ_BY_ONE:
        parts = add_partials(parts).unsqueeze(1)
    block, width = min(16, next_power_of_2(parts.shape[1])), min(4096, next_power_of_2(channels))
    tiles = {"BP": block, "BH": min(8192 // block, width), "BW": width}
    return parts, {"parts": parts.shape[1], "num_warps": 4 if channels <= 256 else 16, **tiles}


def finish_statistics(squares: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Partial sums of squares ``A[segments, parts, H]`` -> norm and scale, ``A[segments, H]``."""
    count, _, channels = squares.shape
    norm, scale = (squares.new_empty(count, channels) for _ in range(2))
    squares, tile = finisher(squares, channels)
    launch(
        finish_statistics_kernel, (count,), squares=squares, gamma=gamma, norm=norm, scale=scale, **tile,
        H=channels, EPS=eps, ACC=accumulator(squares.dtype),
    )  # fmt: skip
    return norm, scale


def gelu_statistics(
    a: Tensor, h: Tensor | None, gamma: Tensor, eps: float, act: str, segments: Segments
) -> tuple[Tensor, Tensor]:
    """norm and scale ``A[segments, H]`` of act(a), which is written to h unless None; h may be a."""
    squares = partial_sums(a, None, h, act, True, False, segments)
    return finish_statistics(squares.squeeze(2), gamma, eps)


def gradient_statistics(
    sums: Tensor, norm: Tensor, gamma: Tensor, eps: float, pair: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """scale and kappa ``[segments, H]`` and the segments' terms of dgamma (and dbeta if ``pair``), ``[1 or 2, segments,
    H]``, from t ``[segments, parts, H]``, beside each part the sums for dbeta if ``pair``."""
    count, channels = norm.shape
    scale, kappa = (torch.empty_like(norm) for _ in range(2))
    terms = norm.new_empty(2 if pair else 1, count, channels)
    sums, tile = finisher(sums, channels)
    launch(
        finish_gradient_kernel, (count,), sums=sums, norm=norm, gamma=gamma, scale=scale, kappa=kappa, terms=terms,
        count=count, **tile, H=channels, PAIR=pair, EPS=eps, ACC=accumulator(norm.dtype),
    )  # fmt: skip
    return scale, kappa, terms


def mlp_backward_statistics(
    a: Tensor | None, ds: Tensor | None, t: Tensor | None, norm: Tensor, gamma: Tensor, eps: float, act: str,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """scale and kappa ``A[segments, H]``, dgamma ``A[H]``, from t ``A[segments, H]``, or from a and ds without it."""
    if t is None:
        assert a is not None
        sums = partial_sums(a, ds, None, act, False, False, segments)
    else:
        sums = t.contiguous().unsqueeze(1)
    scale, kappa, terms = gradient_statistics(sums.flatten(2), norm, gamma, eps, False)
    return scale, kappa, add_partials(terms).view(-1)


@triton.jit(do_not_specialize=SIZES)
def scale_rows_kernel(
    a, out, scale, beta, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out = act(a) [scale] [+ beta]``."""
    part, columns = part_and_columns(H, BN)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    held = columns < H
    if scale is not None:
        factor = tl.load(scale + (part // splits).to(tl.int64) * H + columns, mask=held, other=0.0)[None, :]
    if beta is not None:
        shift = tl.load(beta + columns, mask=held, other=0.0)[None, :]
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    for first in tl.range(0, rows, BM, num_stages=3):
        inside = (row < rows - first)[:, None] & held[None, :]
        at = (begin + first) * H
        value = activate(widen(tl.load(a + at + place, mask=inside, other=0.0)), ACT, NARROW)
        if scale is not None:
            value *= factor
        if beta is not None:
            value += shift
        tl.store(out + at + place, value.to(out.dtype.element_ty), mask=inside)


def scale_rows(a: Tensor, out: Tensor, scale: Tensor | None, beta: Tensor | None, act: str, segments: Segments) -> None:
    """``out = act(a) * scale + beta``, scale ``A[segments, H]``, beta ``A[H]``; 1 and 0 where None. out may be a."""
    passes = row_pass(a, segments)
    launch(scale_rows_kernel, passes.grid, a=a, out=out, scale=scale, beta=beta, **passes.arguments, ACT=act)


@triton.jit(do_not_specialize=SIZES)
def gradient_rows_kernel(
    a, ds, scale, kappa, hs, da, partials, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, ACT: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """hs, da, and ``partials [count * splits, H]`` of da, each unless None."""
    part, columns = part_and_columns(H, BN)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    held = columns < H
    own = (part // splits).to(tl.int64) * H + columns
    factor = tl.load(scale + own, mask=held, other=0.0)[None, :]
    pull = tl.load(kappa + own, mask=held, other=0.0)[None, :]
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    total = tl.zeros([BM, BN], ACC)
    for first in tl.range(0, rows, BM, num_stages=3):
        inside = (row < rows - first)[:, None] & held[None, :]
        at = (begin + first) * H
        u = widen(tl.load(a + at + place, mask=inside, other=0.0))
        d = widen(tl.load(ds + at + place, mask=inside, other=0.0))
        h, slope = activate_with_slope(u, ACT, NARROW)
        if hs is not None:
            tl.store(hs + at + place, (h * factor).to(hs.dtype.element_ty), mask=inside)
        gradient = (d * factor + h * pull) * slope
        total += gradient
        tl.store(da + at + place, gradient.to(da.dtype.element_ty), mask=inside)
    if partials is not None:
        tl.store(partials + part.to(tl.int64) * H + columns, tl.sum(total, axis=0), mask=held)


def gradient_rows(
    a: Tensor, ds: Tensor, scales: tuple[Tensor, Tensor], hs: Tensor | None, da: Tensor, with_sums: bool, act: str,
    segments: Segments,
) -> Tensor | None:  # fmt: skip
    """Writes hs and da as :func:`mlp_backward_pointwise`; partial sums of da ``A[segments * splits, H]`` if wanted."""
    passes, (scale, kappa) = row_pass(a, segments), scales
    shape = (segments.count * passes.splits, a.shape[-1])
    partials = a.new_empty(shape, dtype=statistics_dtype(a.dtype)) if with_sums else None
    launch(
        gradient_rows_kernel, passes.grid, a=a, ds=ds, scale=scale, kappa=kappa, hs=hs, da=da, partials=partials,
        **passes.arguments, ACT=act, ACC=accumulator(a.dtype),
    )  # fmt: skip
    return partials


def mlp_backward_pointwise(
    a: Tensor, ds: Tensor, scales: tuple[Tensor, Tensor], hs: Tensor | None, da: Tensor, act: str, segments: Segments
) -> Tensor:
    """``hs = h * scale`` unless None (may be a), ``da = (ds * scale + h * kappa) * act'(a)`` (may be ds), h = act(a);
    ``scales`` scale and kappa ``A[segments, H]``. Returns column sums of da ``A[H]``, of the values before they are
    rounded."""
    partials = gradient_rows(a, ds, scales, hs, da, True, act, segments)
    assert partials is not None
    return add_partials(partials.unsqueeze(0)).view(-1)
