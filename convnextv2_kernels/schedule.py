"""The chunked schedule of the MLP and of the whole block, for every backend.

The MLP's hidden tensors are four times as wide as the features, so they are made for a chunk of whole images at a
time, used, and thrown away; backward recomputes them. A chunk is sized for the last-level cache on a CPU and for a
memory budget on a GPU. A backend supplies the primitives ``k`` (see ``backends/reference/primitives.py`` for their
contract); this file supplies the order and the algebra, derived in ``docs/kernels.md``.

Notation: M rows, C wide, H hidden; ``z`` LN's output without its affine part, which is folded into the first matrix;
``a = z W1' + b1``; ``h = gelu(a)``; GRN is ``h * scale`` per image and channel, its shift beta folded into the second
bias; ``d`` the gradient of the MLP's output.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.reference.rows import statistics_dtype

# Bytes of one hidden [rows, H] tensor of a chunk. CPU: three of them stay in a 32 MiB last-level cache
# (measured, docs/kernels.md); GPU: chunking only bounds memory.
_DEFAULT_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}


def chunk_bytes(device_type: str) -> int:
    """Size one hidden tensor of a chunk may have; ``CONVNEXTV2_KERNELS_CHUNK_BYTES`` overrides the default."""
    value = os.environ.get("CONVNEXTV2_KERNELS_CHUNK_BYTES")
    if value is None:
        return _DEFAULT_CHUNK_BYTES.get(device_type, 1 << 30)
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"CONVNEXTV2_KERNELS_CHUNK_BYTES must be a positive number of bytes, got {value!r}")
    return int(value)


def saves_hidden(device_type: str) -> bool:
    """Whether ``a`` is kept for backward: one matrix product of seven saved for 4C values per row.

    ``CONVNEXTV2_KERNELS_SAVE_HIDDEN`` = 0 or 1; the default recomputes on a CPU and keeps on a GPU.
    """
    value = os.environ.get("CONVNEXTV2_KERNELS_SAVE_HIDDEN", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"CONVNEXTV2_KERNELS_SAVE_HIDDEN must be 0 or 1, got {value!r}")
    return value == "1" if value else device_type != "cpu"


class Rows(NamedTuple):
    """How M rows fall into images: equal shares when ``offsets`` is None, else ``offsets [N+1]`` slots of
    ``rows_per_slot`` rows. With ``batch_scope`` GRN sees the whole batch as one segment."""

    total: int
    images: int
    rows_per_slot: int
    offsets: Tensor | None
    batch_scope: bool


class Chunk(NamedTuple):
    """Images ``n0:n1``, rows ``r0:r1``, and the GRN segments in it: ``(offsets or None, rows per slot, count)``."""

    n0: int
    n1: int
    r0: int
    r1: int
    segments: tuple[Tensor | None, int, int]

    @property
    def stats(self) -> slice:
        return slice(self.n0, self.n0 + self.segments[2])


def chunks(rows: Rows, hidden: int, itemsize: int, budget: int) -> Iterator[Chunk]:
    """Consecutive runs of whole images whose hidden tensor fits the budget, at least one image each."""
    if rows.batch_scope:
        yield Chunk(0, rows.images, 0, rows.total, (None, 1, 1))
        return
    most = max(1, budget // (hidden * itemsize))
    if rows.offsets is None:
        per_image = rows.total // rows.images if rows.images else 0
        step = max(1, most // max(1, per_image))
        # equal chunks rather than full ones and a small rest
        step = -(-rows.images // max(1, -(-rows.images // step)))
        for n0 in range(0, rows.images, step):
            n1 = min(n0 + step, rows.images)
            yield Chunk(n0, n1, n0 * per_image, n1 * per_image, (None, 1, n1 - n0))
        return
    if rows.total <= most:
        yield Chunk(0, rows.images, 0, rows.total, (rows.offsets, rows.rows_per_slot, rows.images))
        return
    bounds = [o * rows.rows_per_slot for o in rows.offsets.tolist()]
    n0 = 0
    while n0 < rows.images:
        n1 = n0 + 1
        while n1 < rows.images and bounds[n1 + 1] - bounds[n0] <= most:
            n1 += 1
        segments = (rows.offsets[n0 : n1 + 1], rows.rows_per_slot, n1 - n0)
        yield Chunk(n0, n1, bounds[n0], bounds[n1], segments)
        n0 = n1


def _scale_images_(y: Tensor, factors: Tensor | None, rows: Rows, chunk: Chunk) -> Tensor:
    """Multiplies each image's rows of a chunk by its drop-path factor, in place."""
    if factors is None:
        return y
    f = factors.reshape(-1)[chunk.n0 : chunk.n1].to(y.dtype)
    images = chunk.n1 - chunk.n0
    if rows.offsets is None:
        y.view(images, -1, y.shape[-1]).mul_(f[:, None, None]) if y.numel() else None
        return y
    counts = rows.offsets[chunk.n0 : chunk.n1 + 1].diff().long() * rows.rows_per_slot
    return y.mul_(f.repeat_interleave(counts, output_size=chunk.r1 - chunk.r0)[:, None])


def mlp_forward(
    k,
    z: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    factors: Tensor | None,
    rows: Rows,
    eps: float,
    out_dtype: torch.dtype,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``z [M, C]`` -> ``out [M, O]`` in ``out_dtype``, GRN's ``norm [segments, H]``, and ``a [M, H]`` or an empty
    tensor. Matrix products run in z's dtype."""
    stat = statistics_dtype(z.dtype)
    hidden, out_c = w1.shape[0], w2.shape[0]
    gamma = gamma.reshape(-1).to(stat)
    shift = (b2.to(stat) + w2.to(stat) @ beta.reshape(-1).to(stat)).to(z.dtype)
    w1, b1, w2 = w1.to(z.dtype), b1.to(z.dtype), w2.to(z.dtype)
    out = torch.empty(z.shape[0], out_c, dtype=out_dtype, device=z.device)
    segments = 1 if rows.batch_scope else rows.images
    norms = torch.zeros(segments, hidden, dtype=stat, device=z.device)
    kept = z.new_empty((z.shape[0], hidden) if keep_hidden else (0, hidden))
    for chunk in chunks(rows, hidden, z.element_size(), chunk_bytes(z.device.type)):
        part = slice(chunk.r0, chunk.r1)
        a = k.linear(z[part], w1, b1)
        if keep_hidden:
            kept[part] = a
        h, square_sum = k.gelu_square_sum(a, *chunk.segments)
        norms[chunk.stats], scale = k.grn_scale(square_sum, gamma, eps)
        y = k.scaled_linear(h, w2, shift, scale, *chunk.segments)
        y = _scale_images_(y, factors, rows, chunk)
        if residual is None:
            out[part] = y
        else:
            torch.add(residual[part], y, out=out[part])
    return out, norms, kept


class MLPGradients(NamedTuple):
    """Gradients of one MLP call; parameters in the statistics dtype."""

    dz: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    b2: Tensor


def mlp_backward(
    k,
    dout: Tensor,
    z: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    factors: Tensor | None,
    norms: Tensor,
    kept: Tensor,
    rows: Rows,
    eps: float,
    rstd: Tensor | None = None,
) -> MLPGradients:
    """Gradients for ``dout [M, O]``. With ``rstd [M]``, ``z`` is normalised rows and ``dz`` is the gradient of what
    was normalised; without it, of z itself."""
    stat = statistics_dtype(z.dtype)
    hidden, out_c = w1.shape[0], w2.shape[0]
    gamma = gamma.reshape(-1).to(stat)
    w2_stat = w2.to(stat)
    w1, b1, w2 = w1.to(z.dtype), b1.to(z.dtype), w2.to(z.dtype)
    dz = torch.empty_like(z)
    dw1 = torch.zeros(hidden, z.shape[1], dtype=stat, device=z.device)
    dw2 = torch.zeros(out_c, hidden, dtype=stat, device=z.device)
    db1 = torch.zeros(hidden, dtype=stat, device=z.device)
    dgamma = torch.zeros(hidden, dtype=stat, device=z.device)
    db2 = torch.zeros(out_c, dtype=stat, device=z.device)
    for chunk in chunks(rows, hidden, z.element_size(), chunk_bytes(z.device.type)):
        part = slice(chunk.r0, chunk.r1)
        zc = z[part]
        a = kept[part].clone() if kept.shape[0] else k.linear(zc, w1, b1)
        d = dout[part].to(z.dtype)
        if factors is not None:
            d = _scale_images_(d.clone(), factors, rows, chunk)
        norm = norms[chunk.stats]
        scale = k.grn_scale(norm.square(), gamma, eps)[1]
        ds = k.linear_input_grad(d, w2)
        t = k.mlp_backward_reduce(a, ds, *chunk.segments)
        kappa, dgamma_part = k.grn_gradient(t, norm, gamma, eps)
        hs, da, db1_part = k.mlp_backward_pointwise(a, ds, scale, kappa, *chunk.segments)
        dgamma += dgamma_part
        db1 += db1_part
        db2 += k.column_sum(d)
        dw2 += k.linear_weight_grad(d, hs)
        dw1 += k.linear_weight_grad(da, zc)
        dzc = k.linear_input_grad(da, w1)
        dz[part] = dzc if rstd is None else k.normalize_backward(dzc, zc, rstd[part])
    # beta is added to every row before W2: its gradient and its share of dW2 follow from db2 alone
    dbeta = db2 @ w2_stat
    dw2 += torch.outer(db2, beta.reshape(-1).to(stat))
    return MLPGradients(dz, dw1, db1, dgamma, dbeta, dw2, db2)


def fold_layer_norm(
    w1: Tensor, b1: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """``W1 (z * g + s) + b1 = (W1 * g) z + (b1 + W1 s)``: H x C work instead of M x C."""
    return w1 * ln_weight, b1 + w1 @ ln_bias


def unfold_layer_norm(
    dw1f: Tensor, db1: Tensor, w1: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``W1``, ``ln_weight`` and ``ln_bias`` from those of the folded matrix and bias."""
    w1, ln_weight, ln_bias = (t.to(dw1f.dtype) for t in (w1, ln_weight, ln_bias))
    dw1 = dw1f * ln_weight + torch.outer(db1, ln_bias)
    return dw1, (w1 * dw1f).sum(0), db1 @ w1
