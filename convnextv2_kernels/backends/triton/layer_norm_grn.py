"""GRN of LayerNorm of rows ``[..., C]`` in segments: two passes over x each way, of which only statistics remain.

Forward: mean, 1/std and column sums of squares of LN(x) (2 bytes per 16-bit element), result (4 bytes). Backward: sums
of grad z, grad, z z and z, from which the gradients of all parameters follow (4 bytes), gradient (6 bytes). A pass with
sums along a row holds whole rows, 8 elements per thread, as in ``norm_grad.py``; the others are partitioned as in
``reduce.py``. Every program stays in one segment. Rows of more than 4096 columns take LayerNorm's own kernels for the
sums along them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import statistics_dtype
from ...params import Segments
from .gelu import widen
from .launch import accumulator, cdiv, launch, operator
from .mlp_rows import added_parts, finish_statistics, finisher
from .norm import layer_norm_forward, row_tile
from .norm_grad import normalized_gradient
from .reduce import MOST_SPLITS, SIZES, RowPass, add_pair, part_and_columns, part_rows, partial_sums, row_pass
from .segments import segment_bounds

_WIDEST = 4096  # columns of rows that a program holds whole


def _whole_rows(x: Tensor, segments: Segments, tiles: int, least: int) -> RowPass:
    """The partition of a pass over whole rows: parts of so many tiles, and at least so many rows."""
    offsets, rows_per_slot, count = segments
    channels = x.shape[-1]
    tile = row_tile(channels, each=4 if x.dtype == torch.float64 else 8, widest=_WIDEST)
    rows = x.numel() // channels
    each = rows // count if count else 0
    splits = max(1, min(cdiv(each, max(least, tiles * tile.rows)), MOST_SPLITS))
    arguments = {
        "offsets": offsets, "rows_per_slot": rows_per_slot, "M": rows, "count": count, "splits": splits,
        "H": channels, "BM": tile.rows, "BN": tile.columns, "num_warps": tile.warps,
    }  # fmt: skip
    return RowPass(splits, (count * splits,), arguments)


def _columns(x: Tensor, segments: Segments, sums: int = 2) -> RowPass:
    passes = row_pass(x, segments, sums)
    del passes.arguments["NARROW"]  # of activations
    return passes


@triton.jit
def _centred(x, mean, rstd, at, row, valid, inside, place, H: tl.constexpr):
    """z of a tile, 0 outside, and 1/std of its rows; ``at`` is the first."""
    value = widen(tl.load(x + at * H + place, mask=inside, other=0.0))
    mu = tl.load(mean + at + row, mask=valid, other=0.0)
    r = tl.load(rstd + at + row, mask=valid, other=0.0)
    return tl.where(inside, (value - mu[:, None]) * r[:, None], 0.0), r


@triton.jit(do_not_specialize=SIZES)
def normalized_squares_kernel(
    x, weight, bias, mean, rstd, partials, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """mean and rstd of every row, and ``partials [count * splits, H]`` of the squares of ``z weight + bias``."""
    part = tl.program_id(0)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    columns = tl.arange(0, BN)
    held = columns < H
    w = tl.load(weight + columns, mask=held, other=0.0)[None, :]
    b = tl.load(bias + columns, mask=held, other=0.0)[None, :]
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    total = tl.zeros([BM, BN], ACC)
    for first in tl.range(0, rows, BM, num_stages=4):
        valid = row < rows - first
        inside = valid[:, None] & held[None, :]
        at = begin + first
        value = widen(tl.load(x + at * H + place, mask=inside, other=0.0))
        mu = tl.sum(value, axis=1) / H
        centred = tl.where(inside, value - mu[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / H + EPS)
        tl.store(mean + at + row, mu, mask=valid)
        tl.store(rstd + at + row, r, mask=valid)
        y = tl.where(inside, centred * r[:, None] * w + b, 0.0)
        total += y * y
    tl.store(partials + part.to(tl.int64) * H + columns, tl.sum(total, axis=0), mask=held)


@triton.jit(do_not_specialize=SIZES)
def normalized_scale_kernel(
    x, mean, rstd, weight, bias, scale, beta, out, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out = (z weight + bias) scale + beta``."""
    part, columns = part_and_columns(H, BN)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    held = columns < H
    factor = tl.load(scale + (part // splits).to(tl.int64) * H + columns, mask=held, other=0.0)
    shift = tl.load(bias + columns, mask=held, other=0.0) * factor + tl.load(beta + columns, mask=held, other=0.0)
    factor *= tl.load(weight + columns, mask=held, other=0.0)
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    for first in tl.range(0, rows, BM, num_stages=3):
        valid = row < rows - first
        inside = valid[:, None] & held[None, :]
        at = begin + first
        z, _ = _centred(x, mean, rstd, at, row, valid, inside, place, H)
        result = z * factor[None, :] + shift[None, :]
        tl.store(out + at * H + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def normalized_gradient_sums_kernel(
    x, grad, mean, rstd, partials, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``partials [count * splits, 4, H]`` of grad z, grad, z z and z."""
    part, columns = part_and_columns(H, BN)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    held = columns < H
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    of_gz = tl.zeros([BM, BN], ACC)
    of_g = tl.zeros([BM, BN], ACC)
    of_zz = tl.zeros([BM, BN], ACC)
    of_z = tl.zeros([BM, BN], ACC)
    for first in tl.range(0, rows, BM, num_stages=3):
        valid = row < rows - first
        inside = valid[:, None] & held[None, :]
        at = begin + first
        z, _ = _centred(x, mean, rstd, at, row, valid, inside, place, H)
        g = widen(tl.load(grad + at * H + place, mask=inside, other=0.0))
        of_gz += g * z
        of_g += g
        of_zz += z * z
        of_z += z
    out = partials + part.to(tl.int64) * (4 * H) + columns
    tl.store(out, tl.sum(of_gz, axis=0), mask=held)
    tl.store(out + H, tl.sum(of_g, axis=0), mask=held)
    tl.store(out + 2 * H, tl.sum(of_zz, axis=0), mask=held)
    tl.store(out + 3 * H, tl.sum(of_z, axis=0), mask=held)


@triton.jit(do_not_specialize=["parts", *SIZES[:-1]])
def finish_normalized_gradient_kernel(
    sums, weight, bias, gamma, norm, coefficients, terms, offsets, rows_per_slot, M, count, parts,
    H: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """From ``sums [count, parts, 4, H]``: the ``coefficients [count, 3, H]`` slope, pull and shift of
    :func:`normalized_gradient_kernel`, and the segments' ``terms [4, count, H]`` of the gradients of weight, bias,
    gamma and beta, which keep the sums until the means are known."""
    segment = tl.program_id(0).to(tl.int64)
    begin, end = segment_bounds(segment, offsets, rows_per_slot, M, count)
    rows = (end - begin).to(ACC)
    source = sums + segment * parts * (4 * H)
    norm += segment * H
    coefficients += segment * (3 * H)
    of_weight = terms + segment * H
    of_bias = of_weight + tl.cast(count, tl.int64) * H
    of_gamma = of_bias + tl.cast(count, tl.int64) * H
    of_beta = of_gamma + tl.cast(count, tl.int64) * H
    total = tl.zeros([BH], ACC)
    dot = tl.zeros([BH], ACC)
    for first in range(0, H, BH):
        columns = first + tl.arange(0, BH)
        held = columns < H
        of_gz = added_parts(source, 4 * H, parts, columns, held, ACC, BP, BH)
        of_g = added_parts(source + H, 4 * H, parts, columns, held, ACC, BP, BH)
        tl.store(of_weight + columns, of_gz, mask=held)
        tl.store(of_beta + columns, of_g, mask=held)
        tl.store(of_gamma + columns, added_parts(source + 2 * H, 4 * H, parts, columns, held, ACC, BP, BH), mask=held)
        tl.store(of_bias + columns, added_parts(source + 3 * H, 4 * H, parts, columns, held, ACC, BP, BH), mask=held)
        t = tl.load(weight + columns, mask=held, other=0.0) * of_gz
        t += tl.load(bias + columns, mask=held, other=0.0) * of_g
        value = tl.load(norm + columns, mask=held, other=0.0)
        total += value
        dot += tl.load(gamma + columns, mask=held, other=0.0) * t * value
    mean = tl.sum(total, axis=0) / H + EPS
    pull = tl.sum(dot, axis=0) / H / mean / mean
    tl.debug_barrier()
    for first in range(0, H, BW):
        columns = first + tl.arange(0, BW)
        held = columns < H
        of_gz = tl.load(of_weight + columns, mask=held, other=0.0)
        of_g = tl.load(of_beta + columns, mask=held, other=0.0)
        of_zz = tl.load(of_gamma + columns, mask=held, other=0.0)
        of_z = tl.load(of_bias + columns, mask=held, other=0.0)
        w = tl.load(weight + columns, mask=held, other=0.0)
        b = tl.load(bias + columns, mask=held, other=0.0)
        own_gamma = tl.load(gamma + columns, mask=held, other=0.0)
        value = tl.load(norm + columns, mask=held, other=0.0)
        t = w * of_gz + b * of_g
        response = value / mean
        scale = 1.0 + own_gamma * response
        kappa = tl.where(value != 0, (own_gamma * t / mean - pull) / tl.where(value != 0, value, 1.0), 0.0)
        tl.store(of_gamma + columns, response * t, mask=held)
        tl.store(of_weight + columns, scale * of_gz + kappa * (w * of_zz + b * of_z), mask=held)
        tl.store(of_bias + columns, scale * of_g + kappa * (w * of_z + b * rows), mask=held)
        tl.store(coefficients + columns, scale * w, mask=held)
        tl.store(coefficients + H + columns, kappa * w * w, mask=held)
        tl.store(coefficients + 2 * H + columns, kappa * w * b, mask=held)


@triton.jit
def _coefficients(coefficients, segment, columns, held, H: tl.constexpr):
    at = coefficients + segment.to(tl.int64) * (3 * H) + columns
    slope = tl.load(at, mask=held, other=0.0)
    pull = tl.load(at + H, mask=held, other=0.0)
    return slope[None, :], pull[None, :], tl.load(at + 2 * H, mask=held, other=0.0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def normalized_gradient_kernel(
    x, grad, mean, rstd, coefficients, dx, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``dx = rstd (g - mean(g) - z mean(g z))``, ``g = grad slope + z pull + shift`` by the segment's coefficients."""
    part = tl.program_id(0)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    columns = tl.arange(0, BN)
    held = columns < H
    slope, pull, shift = _coefficients(coefficients, part // splits, columns, held, H)
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    for first in tl.range(0, rows, BM, num_stages=3):
        valid = row < rows - first
        inside = valid[:, None] & held[None, :]
        at = begin + first
        z, r = _centred(x, mean, rstd, at, row, valid, inside, place, H)
        g = widen(tl.load(grad + at * H + place, mask=inside, other=0.0)) * slope + z * pull + shift
        of_g = tl.sum(g, axis=1) / H
        of_gz = tl.sum(g * z, axis=1) / H
        result = r[:, None] * (g - of_g[:, None] - z * of_gz[:, None])
        tl.store(dx + at * H + place, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def normalized_pull_kernel(
    x, grad, mean, rstd, coefficients, out, offsets, rows_per_slot, M, count, splits,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The g of :func:`normalized_gradient_kernel`, for rows that no program holds."""
    part, columns = part_and_columns(H, BN)
    begin, rows = part_rows(part, offsets, rows_per_slot, M, count, splits, BM)
    held = columns < H
    slope, pull, shift = _coefficients(coefficients, part // splits, columns, held, H)
    row = tl.arange(0, BM)
    place = row[:, None] * H + columns[None, :]
    for first in tl.range(0, rows, BM, num_stages=2):
        valid = row < rows - first
        inside = valid[:, None] & held[None, :]
        at = begin + first
        z, _ = _centred(x, mean, rstd, at, row, valid, inside, place, H)
        g = widen(tl.load(grad + at * H + place, mask=inside, other=0.0)) * slope + z * pull + shift
        tl.store(out + at * H + place, g.to(out.dtype.element_ty), mask=inside)


def _statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float, own: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """mean, rstd ``A[...]``, and partial sums of the squares of LN(x), ``A[segments, parts, C]``."""
    channels, stat = x.shape[-1], statistics_dtype(x.dtype)
    if channels > _WIDEST:
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        return mean, rstd, partial_sums(y, None, None, "none", True, False, own).squeeze(2)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=stat) for _ in range(2))
    passes = _whole_rows(x, own, tiles=8, least=16)
    squares = x.new_empty(own.count, passes.splits, channels, dtype=stat)
    launch(
        normalized_squares_kernel, passes.grid, x=x, weight=weight, bias=bias, mean=mean, rstd=rstd, partials=squares,
        **passes.arguments, EPS=eps, ACC=accumulator(x.dtype),
    )  # fmt: skip
    return mean, rstd, squares


@operator
def layer_norm_grn_forward(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, gamma: Tensor, beta: Tensor, offsets: Tensor | None,
    rows_per_slot: int, segments: int, ln_eps: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """GRN(LN(x)) like x, mean and rstd ``A[...]``, norm ``A[segments, C]``."""
    own = Segments(offsets, rows_per_slot, segments)
    mean, rstd, squares = _statistics(x, ln_weight, ln_bias, ln_eps, own)
    norm, scale = finish_statistics(squares, gamma, eps)
    y = torch.empty_like(x)
    passes = _columns(x, own)
    launch(
        normalized_scale_kernel, passes.grid, x=x, mean=mean, rstd=rstd, weight=ln_weight, bias=ln_bias, scale=scale,
        beta=beta, out=y, **passes.arguments,
    )  # fmt: skip
    return y, mean, rstd, norm


def _gradient(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, coefficients: Tensor, own: Segments) -> Tensor:
    dx = torch.empty_like(x)
    rows: dict = {"x": x, "grad": grad, "mean": mean, "rstd": rstd, "coefficients": coefficients}
    if x.shape[-1] > _WIDEST:
        pull = _columns(x, own)
        launch(normalized_pull_kernel, pull.grid, **rows, out=dx, **pull.arguments)
        return normalized_gradient(dx, x, mean, rstd)
    passes = _whole_rows(x, own, tiles=4, least=1)
    launch(normalized_gradient_kernel, passes.grid, **rows, dx=dx, **passes.arguments)
    return dx


@operator
def layer_norm_grn_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, ln_weight: Tensor, ln_bias: Tensor, gamma: Tensor,
    norm: Tensor, offsets: Tensor | None, rows_per_slot: int, segments: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx like x, and the gradients of ln_weight, ln_bias, gamma and beta, ``A[C]``."""
    own, channels = Segments(offsets, rows_per_slot, segments), x.shape[-1]
    passes = _columns(x, own, sums=4)
    sums = norm.new_empty(segments, passes.splits, 4 * channels)
    launch(
        normalized_gradient_sums_kernel, passes.grid, x=x, grad=grad, mean=mean, rstd=rstd, partials=sums,
        **passes.arguments, ACC=accumulator(x.dtype),
    )  # fmt: skip
    coefficients, terms = norm.new_empty(segments, 3, channels), norm.new_empty(4, segments, channels)
    sums, tile = finisher(sums, channels)
    tile |= {name: min(tile[name], 1024) for name in ("BH", "BW")}  # with nine values of each column
    launch(
        finish_normalized_gradient_kernel, (segments,), sums=sums, weight=ln_weight, bias=ln_bias, gamma=gamma,
        norm=norm, coefficients=coefficients, terms=terms, offsets=offsets, rows_per_slot=rows_per_slot,
        M=x.numel() // channels, count=segments, **tile, H=channels, EPS=eps, ACC=accumulator(x.dtype),
    )  # fmt: skip
    dx = _gradient(grad, x, mean, rstd, coefficients, own)
    return dx, *add_pair(terms[:2]), *add_pair(terms[2:])
