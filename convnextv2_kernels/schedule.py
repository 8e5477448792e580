"""The chunked schedule of the MLP and of the whole block, for every backend: what is saved, chunked and recomputed.

The MLP's hidden tensors are four times as wide as the features, so they are made for a chunk of whole images at a
time, used, and thrown away; backward recomputes them. A chunk is sized for the last-level cache on a CPU and for a
memory budget on a GPU. A backend supplies the kernels (:class:`~convnextv2_kernels.backends.base.KernelBackend`); this
file supplies the order and the algebra, derived in ``docs/kernels/math.md``.

Notation: M rows, C wide, H hidden; ``z`` LN's output without its affine part, ``y`` with it; ``a = y W1' + b1``;
``h = act(a)``, act a form of GELU; GRN is ``h * scale + beta`` with one scale per image and channel; ``d`` the gradient
of the MLP's output, ``ds = d W2``, ``da`` the gradient of ``a``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends.base import KernelBackend, scale_images_
from .dtypes import as_statistics, cast, statistics_dtype
from .params import (
    BlockBackwardArgs,
    BlockForwardArgs,
    ConvParams,
    GatheredMLPBackwardArgs,
    GatheredMLPForwardArgs,
    MLPBackwardArgs,
    MLPForwardArgs,
    MLPGradRows,
    MLPOptions,
    MLPParams,
    MLPRows,
    NormParams,
    Places,
    RowNorm,
    Segments,
)
from .settings import SAVE_POLICIES, current

# Bytes of one hidden [rows, H] tensor of a chunk. CPU: the three of backward, the feature maps and the weights should
# share the last-level cache (measured, docs/kernels/math.md); GPU: chunking only bounds memory.
_DEFAULT_CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 30}


def chunk_bytes(device_type: str) -> int:
    """Size one hidden tensor of a chunk may have; ``CONVNEXTV2_KERNELS_CHUNK_BYTES`` overrides the default."""
    return current.chunk_bytes or _DEFAULT_CHUNK_BYTES.get(device_type, 1 << 30)


# What a block saves for backward besides its input and one norm per image and hidden channel (SAVE_POLICIES):
#   inputs      nothing: convolution, LayerNorm and the first GEMM run again
#   normalized  LN's normalised rows and 1/std: the first GEMM runs again (one of seven)
#   hidden      those and the first GEMM's output: nothing runs again, four more maps of the width are saved


def save_policy(device_type: str) -> str:
    """One of :data:`SAVE_POLICIES`; ``CONVNEXTV2_KERNELS_SAVE`` overrides the default (CPU inputs, GPU hidden)."""
    return current.save or ("inputs" if device_type == "cpu" else "hidden")


def saves_normalized(save: str) -> bool:
    """Whether a policy saves LayerNorm's normalised rows."""
    return save != "inputs"


class Chunk(NamedTuple):
    """Images ``n0:n1`` of a batch, its rows ``r0:r1``."""

    n0: int
    n1: int
    r0: int
    r1: int
    images: Segments

    def rows(self, t: Tensor) -> Tensor:
        """Its rows of ``t [M, ...]``, which is returned as it is where they are all of them."""
        return t if self.r1 - self.r0 == t.shape[0] else t[self.r0 : self.r1]

    def of_images(self, t: Tensor) -> Tensor:
        """Its entries of ``t [N, ...]``, one an image; a tensor of one segment for the batch is returned as it is."""
        return t if self.n1 - self.n0 == t.shape[0] or t.shape[0] == 1 else t[self.n0 : self.n1]


def chunks(images: Segments, rows: int, hidden: int, itemsize: int, budget: int) -> list[Chunk]:
    """Consecutive runs of whole images whose hidden tensor fits the budget, at least one image each."""
    # fewer rows than half the hidden width would make the GEMMs inefficient, whatever the budget
    most = max(1, budget // (hidden * itemsize), hidden // 2)
    count = images.count
    if images.offsets is None:
        if not count:
            return []
        per_image = rows // count
        step = max(1, most // max(1, per_image))
        if step >= count:
            return [Chunk(0, count, 0, rows, images)]
        # equal chunks rather than full ones and a small rest; large ones start where a tile of rows of any size does
        step = -(-count // -(-count // step))
        step = max(step // 128 * 128, 128) if step > 128 else step
        cuts = [(n0, min(n0 + step, count)) for n0 in range(0, count, step)]
        return [Chunk(n0, n1, n0 * per_image, n1 * per_image, images.images(n0, n1)) for n0, n1 in cuts]
    if rows <= most:
        return [Chunk(0, count, 0, rows, images)]
    bounds = [o * images.rows_per_slot for o in images.offsets.tolist()]
    found = []
    n0 = 0
    while n0 < count:
        n1 = n0 + 1
        while n1 < count and bounds[n1 + 1] - bounds[n0] <= most:
            n1 += 1
        found.append(Chunk(n0, n1, bounds[n0], bounds[n1], images.images(n0, n1)))
        n0 = n1
    return found


def _chunks(batch: MLPRows, rows: int, hidden: int, options: MLPOptions) -> list[Chunk]:
    """The chunks of a call: one where GRN sees the whole batch."""
    images = batch.images
    if options.batch_scope:
        return [Chunk(0, images.count, 0, rows, images)]
    return chunks(images, rows, hidden, options.dtype.itemsize, chunk_bytes(batch.x.device.type))


class _Rows:
    """Rows ``[M, ...]`` that come chunk by chunk; those of a single chunk are taken as they are."""

    def __init__(self, rows: int):
        self._rows = rows
        self.value: Tensor | None = None

    def put(self, first: int, last: int, part: Tensor) -> None:
        if part.shape[0] == self._rows:
            self.value = part
            return
        if self.value is None:
            self.value = part.new_empty(self._rows, *part.shape[1:])
        self.value[first:last] = part


def mlp_forward(
    backend: KernelBackend,
    batch: MLPRows,
    params: MLPParams,
    layer_norm: NormParams | None,
    options: MLPOptions,
    norm_of_rows: RowNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out [M, O]``, GRN's ``norm [segments, H]``, and ``a [M, H]``, empty unless the policy saves it.

    With ``layer_norm``, for a backend that folds it, the rows are LN's normalised rows z. Rows at places of a map are
    normalised as they are read, a chunk at a time, with ``norm_of_rows``."""
    x, images = batch.x, batch.images
    total = x.shape[0] if batch.places is None else batch.places.rows
    if x.dtype is not options.dtype:
        x = x.new_empty(1, dtype=options.dtype)  # from here on it only says what the operands are
    hidden = params.w1.shape[0]
    gamma, beta = as_statistics(params.gamma.reshape(-1), params.beta.reshape(-1), like=x)
    params = MLPParams(params.w1, params.b1, gamma, beta, params.w2, params.b2)
    weights = backend.prepare_mlp(params, layer_norm, x)
    factors = batch.drop_path_scale
    if factors is not None:
        batch = batch._replace(drop_path_scale=factors.reshape(-1).contiguous())  # perhaps a column of a table
    segments = 1 if options.batch_scope else images.count
    parts = _chunks(batch, total, hidden, options)
    if len(parts) == 1:
        rows = batch if batch.places is None else _rows_of(backend, parts[0], batch, norm_of_rows, options)
        out, norm, saved = backend.mlp_forward(rows, weights, options)
        return out, norm, x.new_empty(0, hidden) if saved is None else saved
    saved = x.new_empty(total if options.save == "hidden" else 0, hidden)
    batch = batch._replace(hidden=saved if options.save == "hidden" else None)
    outs, norms = _Rows(total), _Rows(segments)
    for part in parts:
        rows = _rows_of(backend, part, batch, norm_of_rows, options)
        result = backend.mlp_forward(rows, weights, options)
        del rows  # before the next chunk's are made
        outs.put(part.r0, part.r1, result.out)
        norms.put(part.n0, part.n1, result.norm)
    if outs.value is None or norms.value is None:  # no image at all
        stat = statistics_dtype(x.dtype)
        out = x.new_empty(total, params.w2.shape[0], dtype=batch.out_dtype)
        return out, x.new_zeros(segments, hidden, dtype=stat), saved
    return outs.value, norms.value, saved


def _rows_of(
    backend: KernelBackend, chunk: Chunk, batch: MLPRows, norm: RowNorm | None, options: MLPOptions
) -> MLPRows:
    residual, hidden = (None if t is None else chunk.rows(t) for t in (batch.residual, batch.hidden))
    factors = None if batch.drop_path_scale is None else batch.drop_path_scale[chunk.n0 : chunk.n1]
    x, places = batch.x, batch.places
    if places is None:
        x = chunk.rows(x)
    else:
        places = places.of_rows(chunk.r0, chunk.r1)
        if norm is not None:
            x, places = cast(_flat(backend.gather_normalize(x, places, norm)[0]), options.dtype), None
    return MLPRows(x, residual, factors, chunk.images, batch.out_dtype, hidden, places)


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


class Saved(NamedTuple):
    """What backward finds: GRN's ``norms [segments, H]``, ``hidden [M, H]`` or an empty tensor; with LayerNorm in front
    its parameters, and ``rstd [M]``, or ``eps`` where rows are gathered, and normalised, again."""

    norms: Tensor
    hidden: Tensor
    layer_norm: NormParams | None = None
    rstd: Tensor | None = None
    eps: float = 0.0


def mlp_backward(
    backend: KernelBackend, dout: Tensor, batch: MLPRows, params: MLPParams, saved: Saved, options: MLPOptions
) -> MLPGradients:
    """Gradients for ``dout [M, O]``.

    Without LayerNorm the rows of ``batch`` are the MLP's input. With it they are normalised rows z, and the gradient is
    that of what was normalised (the convolution's output). Rows at places of a map are gathered again, with LayerNorm
    normalised; the gradient is then that of the map, zero elsewhere.
    """
    x, layer_norm, width = batch.x, saved.layer_norm, params.w1.shape[1]
    total = x.shape[0] if batch.places is None else batch.places.rows
    if x.dtype is not options.dtype:
        x = x.new_empty(1, dtype=options.dtype)  # as in forward
    stat = statistics_dtype(x.dtype)
    gamma, beta = as_statistics(params.gamma.reshape(-1), params.beta.reshape(-1), like=x)
    fold = layer_norm is not None and backend.folds_layer_norm
    params = MLPParams(params.w1, params.b1, gamma, beta, params.w2, None)
    weights = backend.prepare_mlp(params, layer_norm if fold else None, x)
    ln_weight = None if layer_norm is None or fold else as_statistics(layer_norm.weight, like=x)[0]
    dxs, sums = _Rows(total), None
    dx_map = None if batch.places is None else torch.zeros_like(batch.x, memory_format=torch.contiguous_format)
    for part in _chunks(batch, total, params.w1.shape[0], options):
        if batch.places is None:
            rows, places = part.rows(x), None
            z, rstd = (None, None) if saved.rstd is None else (rows, part.rows(saved.rstd))
        else:
            places = batch.places.of_rows(part.r0, part.r1)
            rows, z, rstd = _gathered_again(backend, batch.x, places, saved, options)
        y = rows if layer_norm is None or fold else layer_norm.apply(rows)
        preserve_a = saved.hidden.shape[0] > 0
        a = part.rows(saved.hidden) if preserve_a else backend.linear(y, weights.w1, weights.b1)
        d = cast(part.rows(dout), x.dtype)
        if batch.drop_path_scale is not None:
            factors = batch.drop_path_scale.reshape(-1)[part.n0 : part.n1]
            d = scale_images_(d.clone(), factors, part.images)
        d_sum = backend.column_sum(d)
        norm = part.of_images(saved.norms)
        grads = backend.mlp_backward(
            MLPGradRows(a, d, d_sum, norm, z, rstd, ln_weight, part.images, preserve_a, places, dx_map),
            weights,
            options,
        )
        if grads.dx is not None:
            dxs.put(part.r0, part.r1, grads.dx)
        weight_grad = backend.linear_weight_grad(grads.da, y)
        found = [weight_grad, grads.db1, grads.dgamma, grads.dw2, d_sum, grads.dln_weight, grads.dln_bias]
        sums = found if sums is None else [_added(total, term) for total, term in zip(sums, found, strict=True)]
    if sums is None:  # no image at all
        sums = _zeros(params, width, stat)
        dxs.put(0, 0, x.new_empty(0, width))
    dw1, db1, dgamma, dw2, db2, dln_weight, dln_bias = sums
    assert dw1 is not None and db1 is not None and dgamma is not None and dw2 is not None and db2 is not None
    if fold:
        assert layer_norm is not None
        dw1, dln_weight, dln_bias = backend.unfold_layer_norm(params.w1, layer_norm, dw1, db1)
    dx = dxs.value if dx_map is None else dx_map
    assert dx is not None
    # beta is added to every row before W2, so its gradient follows from db2 alone
    dbeta = db2 @ cast(params.w2, stat)
    return MLPGradients(dx, dw1, db1, dgamma, dbeta, dw2, db2, dln_weight, dln_bias)


def _gathered_again(
    backend: KernelBackend, x: Tensor, places: Places, saved: Saved, options: MLPOptions
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows at their places in a map as operands ``[M, C]`` of GEMMs; with LayerNorm also z and rstd."""
    if saved.layer_norm is None:
        return backend.gathered_rows(x, places, options.dtype), None, None
    z, rstd = backend.gather_normalize(x, places, RowNorm(None, None, saved.eps))
    z = _flat(z)
    return cast(z, options.dtype), z, rstd.view(-1)


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sum over chunks in order; the first part becomes the total, so a single chunk costs no extra pass."""
    return None if total is None or part is None else total.add_(part)


def _zeros(params: MLPParams, width: int, stat: torch.dtype) -> list[Tensor | None]:
    """The sums of a batch without images."""
    hidden, out_c = params.w1.shape[0], params.w2.shape[0]
    vectors = [params.w1.new_zeros(n, dtype=stat) for n in (hidden, hidden, out_c, width, width)]
    db1, dgamma, db2, dln_weight, dln_bias = vectors
    dw1, dw2 = params.w1.new_zeros(hidden, width, dtype=stat), params.w2.new_zeros(out_c, hidden, dtype=stat)
    return [dw1, db1, dgamma, dw2, db2, dln_weight, dln_bias]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _reshaped(out: Tensor, shape) -> Tensor:
    """A tensor that is nobody's view: autograd forbids changing views that a function returned in place."""
    return torch.ops.aten._unsafe_view.default(out, shape)


def run_mlp_forward(backend: KernelBackend, a: MLPForwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, norms, hidden)`` of the operator ``mlp_forward``."""
    residual = None if a.residual is None else _flat(a.residual)
    batch = MLPRows(cast(_flat(a.x), a.dtype), residual, a.factors, a.segments, a.x.dtype)
    out, norms, hidden = mlp_forward(backend, batch, a.mlp, None, a.options)
    return _reshaped(out, (*a.x.shape[:-1], a.w2.shape[0])), norms, hidden


def run_mlp_backward(backend: KernelBackend, a: MLPBackwardArgs) -> tuple[Tensor, ...]:
    """``(dx, dw1, db1, dgamma, dbeta, dw2, db2)``, db2 a statistic, the others of their parameters' dtypes."""
    batch = MLPRows(cast(_flat(a.x), a.dtype), None, a.factors, a.segments, a.x.dtype)
    grads = mlp_backward(backend, _flat(a.dout), batch, a.mlp, Saved(a.norms, a.hidden), a.options)
    return cast(grads.x, a.x.dtype).view(a.x.shape), *_mlp_grads(grads, a.mlp)


def run_gathered_mlp_forward(backend: KernelBackend, a: GatheredMLPForwardArgs) -> tuple[Tensor, Tensor]:
    """``(out, norms)`` of the operator ``gathered_mlp_forward``."""
    residual = None if a.residual is None else _flat(a.residual)
    batch = MLPRows(a.x, residual, a.factors, a.segments, a.x.dtype, places=a.places)
    layer_norm, norm = a.layer_norm, None
    if layer_norm is not None:
        weight, bias = (None, None) if backend.folds_layer_norm else as_statistics(*layer_norm, like=a.x)
        norm = RowNorm(weight, bias, a.eps)
    folded = layer_norm if backend.folds_layer_norm else None
    out, norms, _ = mlp_forward(backend, batch, a.mlp, folded, a.options, norm)
    side = a.places.side
    return _reshaped(out, (a.patch_of_slot.shape[0], side, side, a.w2.shape[0])), norms


def run_gathered_mlp_backward(backend: KernelBackend, a: GatheredMLPBackwardArgs) -> tuple[Tensor, ...]:
    """``(dx, dln_weight, dln_bias, dw1, db1, dgamma, dbeta, dw2, db2)``, db2 a statistic, the others of their
    parameters' dtypes; without LayerNorm its gradients are empty."""
    batch = MLPRows(a.x, None, a.factors, a.segments, a.x.dtype, places=a.places)
    saved = Saved(a.norms, a.x.new_empty(0, a.w1.shape[0], dtype=a.dtype), a.layer_norm, eps=a.eps)
    grads = mlp_backward(backend, _flat(a.dout), batch, a.mlp, saved, a.options)
    norm_grads = a.x.new_empty(0), a.x.new_empty(0)
    if a.layer_norm is not None:
        assert grads.ln_weight is not None and grads.ln_bias is not None
        norm_grads = cast(grads.ln_weight, a.layer_norm.weight.dtype), cast(grads.ln_bias, a.layer_norm.bias.dtype)
    return grads.x, *norm_grads, *_mlp_grads(grads, a.mlp)


def _mlp_grads(grads: MLPGradients, params: MLPParams) -> tuple[Tensor, ...]:
    w1, b1, gamma, beta, w2, _ = params
    return (
        cast(grads.w1, w1.dtype),
        cast(grads.b1, b1.dtype),
        cast(grads.gamma, gamma.dtype).view(gamma.shape),
        cast(grads.beta, beta.dtype).view(beta.shape),
        cast(grads.w2, w2.dtype),
        grads.b2,
    )


def _conv_norm(
    backend: KernelBackend,
    x: Tensor,
    conv: ConvParams,
    neighbours: Tensor | None,
    layer_norm: NormParams | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LN(conv(x)), or without ``layer_norm`` its normalised rows; and 1/std."""
    weight, bias, *affine = as_statistics(*conv, *(layer_norm or (None, None)), like=x)
    assert weight is not None
    return backend.depthwise_conv_normalize(x, weight, bias, neighbours, (affine[0], affine[1]), eps)


def run_block_forward(backend: KernelBackend, a: BlockForwardArgs) -> tuple[Tensor, ...]:
    """``(out, z, rstd, norms, hidden)`` of the operator ``block_forward``; what the policy does not save is empty."""
    x, dtype, fold = a.x, a.dtype, backend.folds_layer_norm
    saves = saves_normalized(a.save)
    z = rstd = None
    if saves or fold:
        z, rstd = _conv_norm(backend, x, a.conv, a.neighbours, None, a.eps)
        z = cast(z, dtype)
        y = z if fold else a.layer_norm.apply(z)
    else:
        y = _conv_norm(backend, x, a.conv, a.neighbours, a.layer_norm, a.eps)[0]
        y = cast(y, dtype)
    batch = MLPRows(_flat(y), _flat(x), a.factors, a.segments, x.dtype)
    out, norms, hidden = mlp_forward(backend, batch, a.mlp, a.layer_norm if fold else None, a.options)
    if not saves or z is None or rstd is None:
        z, rstd = y.new_empty(0), x.new_empty(0, dtype=statistics_dtype(x.dtype))
    return _reshaped(out, x.shape), z, rstd, norms, hidden


def run_block_backward(backend: KernelBackend, a: BlockBackwardArgs) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters of the convolution, LayerNorm and the MLP, in the order of the schema;
    those of the biases of the convolution and of the MLP's output are statistics."""
    x, z, rstd = a.x, a.z, a.rstd
    if z.dim() == 1:
        z, rstd = _conv_norm(backend, x, a.conv, a.neighbours, None, a.eps)
        z = cast(z, a.dtype)
    batch = MLPRows(_flat(z), None, a.factors, a.segments, x.dtype)
    saved = Saved(a.norms, a.hidden, a.layer_norm, rstd.view(-1))
    grads = mlp_backward(backend, _flat(a.dout), batch, a.mlp, saved, a.options)
    assert grads.ln_weight is not None and grads.ln_bias is not None
    dy = cast(grads.x, x.dtype).view(x.shape)
    ddw, ddb = backend.depthwise_conv_backward_weight(dy, x, a.neighbours, a.dw_weight.shape[-1])
    (weight,) = as_statistics(a.dw_weight, like=x)
    dx = backend.depthwise_conv_forward(dy, weight, None, a.dout, a.neighbours, flip=True)
    norm_grads = cast(grads.ln_weight, a.ln_weight.dtype), cast(grads.ln_bias, a.ln_bias.dtype)
    return dx, cast(ddw, a.dw_weight.dtype), ddb, *norm_grads, *_mlp_grads(grads, a.mlp)


__all__ = ["SAVE_POLICIES", "Chunk", "MLPGradients", "Saved", "chunk_bytes", "chunks", "save_policy"]
