"""The chunked schedule of the MLP and of the whole block, for every backend.

The MLP's hidden tensors are four times as wide as the features, so they are made for a chunk of whole images at a
time, used, and thrown away; backward recomputes them. A chunk is sized for the last-level cache on a CPU and for a
memory budget on a GPU. A backend supplies the primitives ``k`` (see ``backends/reference/mlp.py`` for their
contract); this file supplies the order and the algebra, derived in ``docs/kernels/math.md``.

Notation: M rows, C wide, H hidden; ``z`` LN's output without its affine part, ``y`` with it; ``a = y W1' + b1``;
``h = act(a)``, act a form of GELU; GRN is ``h * scale + beta`` with one scale per image and channel; ``d`` the gradient
of the MLP's output, ``ds = d W2``, ``da`` the gradient of ``a``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.reference.norm import statistics_dtype

# Bytes of one hidden [rows, H] tensor of a chunk. CPU: the three of backward, the feature maps and the weights should
# share the last-level cache (measured, docs/kernels/math.md); GPU: chunking only bounds memory.
_DEFAULT_CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 30}


def chunk_bytes(device_type: str) -> int:
    """Size one hidden tensor of a chunk may have; ``CONVNEXTV2_KERNELS_CHUNK_BYTES`` overrides the default."""
    value = os.environ.get("CONVNEXTV2_KERNELS_CHUNK_BYTES")
    if value is None:
        return _DEFAULT_CHUNK_BYTES.get(device_type, 1 << 30)
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"CONVNEXTV2_KERNELS_CHUNK_BYTES must be a positive number of bytes, got {value!r}")
    return int(value)


# What a block keeps for backward besides its input and one norm per image and hidden channel:
#   inputs      nothing: convolution, LayerNorm and the first product run again
#   normalized  LN's normalised rows and 1/std: the first product runs again (one matrix product of seven)
#   hidden      those and the first product's output: nothing runs again, four more maps of the width are kept
SAVE_POLICIES = ("inputs", "normalized", "hidden")


def save_policy(device_type: str) -> str:
    """One of :data:`SAVE_POLICIES`; ``CONVNEXTV2_KERNELS_SAVE`` overrides the default (CPU inputs, GPU hidden)."""
    value = os.environ.get("CONVNEXTV2_KERNELS_SAVE") or ("inputs" if device_type == "cpu" else "hidden")
    if value not in SAVE_POLICIES:
        raise ValueError(f"CONVNEXTV2_KERNELS_SAVE must be one of {', '.join(SAVE_POLICIES)}, got {value!r}")
    return value


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

    def images(self, rows: Rows) -> tuple[Tensor | None, int, int]:
        """``(offsets or None, rows per slot, count)`` of its images: its segments, unless GRN sees the whole batch."""
        offsets = None if rows.offsets is None else rows.offsets[self.n0 : self.n1 + 1]
        return offsets, rows.rows_per_slot, self.n1 - self.n0


def chunks(rows: Rows, hidden: int, itemsize: int, budget: int) -> Iterator[Chunk]:
    """Consecutive runs of whole images whose hidden tensor fits the budget, at least one image each."""
    if rows.batch_scope:
        yield Chunk(0, rows.images, 0, rows.total, (None, 1, 1))
        return
    # fewer rows than half the hidden width would make the products inefficient, whatever the budget
    most = max(1, budget // (hidden * itemsize), hidden // 2)
    if rows.offsets is None:
        if not rows.images:
            return
        per_image = rows.total // rows.images
        step = max(1, most // max(1, per_image))
        # equal chunks rather than full ones and a small rest; large ones start where a tile of rows of any size does
        step = -(-rows.images // -(-rows.images // step))
        step = max(step // 128 * 128, 128) if step > 128 else step
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
        if y.numel():
            y.view(images, -1, y.shape[-1]).mul_(f[:, None, None])
        return y
    counts = rows.offsets[chunk.n0 : chunk.n1 + 1].diff().long() * rows.rows_per_slot
    return y.mul_(f.repeat_interleave(counts, output_size=chunk.r1 - chunk.r0)[:, None])


def _place(total: Tensor | None, part: slice, value: Tensor, rows: int) -> Tensor:
    """Puts a chunk's rows where they belong among ``rows`` of them; a single chunk's are taken as they are."""
    if value.shape[0] == rows:
        return value
    total = value.new_empty(rows, *value.shape[1:]) if total is None else total
    total[part] = value
    return total


class LayerNormParams(NamedTuple):
    """LN in front of the MLP, whose normalised rows z are the schedule's input: ``y = z * weight + bias``."""

    weight: Tensor
    bias: Tensor

    def apply(self, z: Tensor) -> Tensor:
        return torch.addcmul(self.bias.to(z.dtype), z, self.weight.to(z.dtype))


def mlp_forward(
    k,
    y: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    factors: Tensor | None,
    rows: Rows,
    act: str,
    eps: float,
    out_dtype: torch.dtype,
    keep_hidden: bool,
    layer_norm: LayerNormParams | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y [M, C]`` -> ``out [M, O]`` in ``out_dtype``, GRN's ``norm [segments, H]``, and ``a [M, H]`` or an empty
    tensor. Matrix products run in y's dtype.

    With ``layer_norm``, for a backend that folds it, y is LN's normalised rows z."""
    stat = statistics_dtype(y.dtype)
    hidden, out_c = w1.shape[0], w2.shape[0]
    gamma, beta = (p.reshape(-1).to(stat).contiguous() for p in (gamma, beta))
    w1, b1, w2, b2 = k.prepare_parameters(w1, b1, w2, b2, beta, layer_norm, y)
    segments = 1 if rows.batch_scope else rows.images
    factors = None if factors is None else factors.reshape(-1).contiguous()  # perhaps a column of a table
    norms = kept = out = None
    for chunk in chunks(rows, hidden, y.element_size(), chunk_bytes(y.device.type)):
        part = slice(chunk.r0, chunk.r1)
        add = None if residual is None else residual[part]
        f = None if factors is None else factors[chunk.n0 : chunk.n1]
        result = k.fused_forward(
            y[part],
            w1,
            b1,
            act,
            gamma,
            eps,
            w2,
            b2,
            add,
            f,
            out_dtype,
            keep_hidden,
            chunk.images(rows),
            rows.batch_scope,
        )
        if result is None:
            a = k.linear(y[part], w1, b1)
            if keep_hidden:
                kept = _place(kept, part, a, y.shape[0])
            inside = None if factors is not None else add
            result, norm = k.gelu_grn_linear(a, act, gamma, beta, eps, w2, b2, inside, kept is a, *chunk.segments)
            if factors is not None:
                result = _scale_images_(result, factors, rows, chunk)
                result = result if add is None else add + result
            result = result.to(out_dtype)
        else:
            result, norm, a = result
            kept = _place(kept, part, a, y.shape[0]) if keep_hidden else None
        norms = _place(norms, chunk.stats, norm, segments)
        out = _place(out, part, result, y.shape[0])
    if out is None:  # no image at all
        out, norms = y.new_empty(y.shape[0], out_c, dtype=out_dtype), y.new_zeros(segments, hidden, dtype=stat)
    return out, norms, y.new_empty(0, hidden) if kept is None else kept


class MLPGradients(NamedTuple):
    """Gradients of one MLP call; parameters in the statistics dtype. ``ln_weight`` and ``ln_bias`` with LN only."""

    x: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    b2: Tensor
    ln_weight: Tensor | None
    ln_bias: Tensor | None


def _accumulate(total: Tensor | None, part: Tensor) -> Tensor:
    """Sum over chunks in order; the first part becomes the total, so a single chunk costs no extra pass."""
    return part if total is None else total.add_(part)


def mlp_backward(
    k,
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    factors: Tensor | None,
    norms: Tensor,
    kept: Tensor,
    rows: Rows,
    act: str,
    eps: float,
    layer_norm: LayerNormParams | None = None,
    rstd: Tensor | None = None,
) -> MLPGradients:
    """Gradients for ``dout [M, O]``.

    Without ``layer_norm`` x is the MLP's input. With it x is normalised rows z, ``rstd [M]`` their 1/std, and the
    gradient is that of what was normalised (the convolution's output).
    """
    stat = statistics_dtype(x.dtype)
    hidden, out_c = w1.shape[0], w2.shape[0]
    gamma, shift = (p.reshape(-1).to(stat).contiguous() for p in (gamma, beta))
    w1_given, w2_stat = w1, w2.to(stat)
    fold = layer_norm is not None and k.FOLDS_LAYER_NORM
    w1, b1, w2, _ = k.prepare_parameters(w1, b1, w2, None, shift, layer_norm if fold else None, x)
    gain = None if layer_norm is None or fold else layer_norm.weight.to(stat).contiguous()
    dw1 = dw2 = db1 = db2 = dgamma = dgain = dshift = dx = None
    for chunk in chunks(rows, hidden, x.element_size(), chunk_bytes(x.device.type)):
        part = slice(chunk.r0, chunk.r1)
        y = x[part] if layer_norm is None or fold else layer_norm.apply(x[part])
        keep = kept.shape[0] > 0
        a = kept[part] if keep else k.linear(y, w1, b1)
        d = dout[part].to(x.dtype)
        if factors is not None:
            d = _scale_images_(d.clone(), factors, rows, chunk)
        db2_part = k.column_sum(d)
        z, std = (x[part], rstd[part]) if fold else (None, None)
        grads = k.fused_backward(
            a,
            act,
            d,
            db2_part,
            norms[chunk.stats],
            gamma,
            shift,
            eps,
            w1,
            w2,
            z,
            std,
            chunk.images(rows),
            rows.batch_scope,
        )
        if grads is None:
            da, db1_part, dgamma_part, dw2_part = k.gelu_grn_linear_backward(
                a, act, d, db2_part, norms[chunk.stats], gamma, shift, eps, w2, keep, *chunk.segments
            )
            dy = k.linear_input_grad(da, w1)
            if layer_norm is not None:
                dy, dgain_part, dshift_part = k.normalized_backward(dy, x[part], rstd[part], gain)
                if not fold:
                    dgain = _accumulate(dgain, dgain_part)
                    dshift = _accumulate(dshift, dshift_part)
        else:
            da, dy, db1_part, dgamma_part, dw2_part = grads
        dgamma = _accumulate(dgamma, dgamma_part)
        db1 = _accumulate(db1, db1_part)
        db2 = _accumulate(db2, db2_part)
        dw2 = _accumulate(dw2, dw2_part)
        dw1 = _accumulate(dw1, k.linear_weight_grad(da, y))
        dx = _place(dx, part, dy, x.shape[0])
    if dx is None:  # no image at all
        zero = [torch.zeros(n, dtype=stat, device=x.device) for n in (hidden, hidden, out_c, x.shape[1], x.shape[1])]
        dgamma, db1, db2, dgain, dshift = zero
        dx, dw1, dw2 = torch.empty_like(x), torch.zeros_like(w1, dtype=stat), torch.zeros_like(w2, dtype=stat)
    if fold:
        dw1, dgain, dshift = k.unfold_layer_norm(w1_given, layer_norm, dw1, db1)
    # beta is added to every row before W2, so its gradient follows from db2 alone
    return MLPGradients(dx, dw1, db1, dgamma, db2 @ w2_stat, dw2, db2, dgain, dshift)
