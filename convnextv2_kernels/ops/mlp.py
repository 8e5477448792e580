"""The pointwise MLP with GRN, one autograd node over the chunked schedule."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .. import schedule
from ..backends import reference
from ..dtypes import as_statistics, gemm_dtype, statistics_dtype
from ..layout import PatchLayout
from ..params import GatheredMLPBackwardArgs, GatheredMLPForwardArgs, MLPBackwardArgs, MLPForwardArgs, Segments
from . import _checks as check
from . import _operators
from ._dispatch import composite, dispatch, once_differentiable

# w1, b1, gamma, beta, w2, b2
MLPParameters: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]


class _PointwiseMLP(torch.autograd.Function):
    """Takes the fields of :class:`MLPForwardArgs`."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = composite(_operators.mlp_forward, schedule.run_mlp_forward, MLPForwardArgs._make(inputs))
        _PointwiseMLP.save(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def save(ctx, inputs, outputs):
        x, w1, b1, gamma, beta, w2, b2, residual, factors, offsets, *settings = inputs
        ctx.save_for_backward(x, w1, b1, gamma, beta, w2, factors, offsets, *outputs[1:])
        ctx.settings, ctx.b2_dtype, ctx.has_residual = settings, b2.dtype, residual is not None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _PointwiseMLP.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        grad = grad.contiguous()
        arguments = MLPBackwardArgs(grad, *ctx.saved_tensors, *ctx.settings)
        grads = composite(_operators.mlp_backward, schedule.run_mlp_backward, arguments)
        dx, *grads, db2 = grads
        residual = grad if ctx.has_residual else None
        return dx, *grads, db2.to(ctx.b2_dtype), residual, *(None for _ in range(2 + len(ctx.settings)))


# For programs of torch.export, which hold the operator without the function around it.
_operators.differentiate("mlp_forward", _PointwiseMLP)


def check_mlp(
    x: Tensor,
    params: MLPParameters,
    out_channels: int,
    layout: PatchLayout | None,
    drop_path_scale: Tensor | None,
    settings: tuple[str, str],
    layer_scale: Tensor | None,
) -> None:
    """The arguments that :func:`pointwise_mlp` and the block share; ``settings`` are scope and act."""
    w1, b1, gamma, beta, w2, b2 = params
    c = x.shape[-1]
    check.check_float(w1, "w1")
    if w1.dim() != 2:
        raise ValueError(f"w1 has shape {list(w1.shape)}, expected [hidden, {c}]")
    hidden = w1.shape[0]
    if hidden < 1:
        raise ValueError(f"w1 has shape {list(w1.shape)}, expected [hidden, {c}] with hidden >= 1")
    check.check_param(w1, "w1", (hidden, c), x)
    check.check_param(b1, "b1", (hidden,), x)
    if (gamma is None) != (beta is None):
        given, missing = ("gamma", "beta") if beta is None else ("beta", "gamma")
        raise ValueError(f"{missing} must be a tensor where {given} is, or both None (no GRN), got None")
    if gamma is not None and beta is not None:
        check.check_param(gamma, "gamma", hidden, x)
        check.check_param(beta, "beta", hidden, x)
    check.check_param(w2, "w2", (out_channels, hidden), x)
    check.check_param(b2, "b2", (out_channels,), x)
    if layer_scale is not None:
        check.check_param(layer_scale, "layer_scale", (out_channels,), x)
    scope, act = settings
    check.check_scope(scope)
    check.check_drop_path_scale(drop_path_scale, x.shape[0] if layout is None else layout.num_images, x)
    check.check_act(act)


def _out_channels(w2: Tensor) -> int:
    check.check_float(w2, "w2")
    if w2.dim() != 2 or w2.shape[0] < 1:
        raise ValueError(f"w2 has shape {list(w2.shape)}, expected [out_channels, hidden]")
    return w2.shape[0]


def as_kernels_take(params: MLPParameters, layer_scale: Tensor | None, x: Tensor) -> tuple[Tensor, ...]:
    """The MLP's parameters with layer scale folded into w2 and b2, and zeros for gamma and beta where there is no GRN.

    The products are formed, and differentiated, in the statistics dtype: GEMM operands are rounded once."""
    w1, b1, gamma, beta, w2, b2 = params
    if gamma is None or beta is None:
        # two tensors: torch.compile refuses one tensor given twice to an autograd function
        gamma, beta = w1.new_zeros(w1.shape[0]), w1.new_zeros(w1.shape[0])
    if layer_scale is not None:
        w2, b2, scale = as_statistics(w2, b2, layer_scale, like=x)
        w2, b2 = w2 * scale[:, None], b2 * scale
    return w1, b1, gamma, beta, w2, b2


def scale_branch(
    y: Tensor, layer_scale: Tensor, residual: Tensor | None, drop_path_scale: Tensor | None, layout: PatchLayout | None
) -> Tensor:
    """``residual + drop_path_scale * layer_scale * y`` in the statistics dtype, returned in the dtype of y.

    For GEMMs in float16, which cannot hold the product of a weight and a layer scale that starts at 1e-6."""
    stat = statistics_dtype(y.dtype)
    out = y.to(stat) * layer_scale.to(stat)
    if drop_path_scale is not None:
        out = out * reference.norm.spread_over_rows(drop_path_scale.reshape(-1, 1).to(stat), y, layout)
    return (out if residual is None else residual.to(stat) + out).to(y.dtype)


def pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None = None,
    residual: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    scope: str = "image",
    act: str = "gelu",
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """``residual + drop_path_scale * layer_scale * (GRN(GELU(x W1' + b1)) W2' + b2)`` (paper Figure 5), one autograd
    node.

    Args:
        x: packed ``[P, s, s, C]``, or dense ``[N, H, W, C]`` when ``layout`` is None.
        w1: ``[H, C]``, b1: ``[H]``; gamma, beta: H elements, or both None for no GRN; w2: ``[O, H]``, b2: ``[O]``.
        residual: ``[..., O]`` like the output, or None. drop_path_scale: ``[N]``, one constant factor per image.
        scope, eps: of GRN, see :func:`global_response_norm`. act: "gelu" (exact) or "gelu_tanh", PyTorch's
            ``approximate="tanh"``.
        layer_scale: ``[O]``, of ConvNeXt V1 (and Touvron et al. 2021), or None for 1. Kernels see it folded into w2 and
            b2; float16, which cannot hold such products, multiplies the result instead.

    Returns:
        ``[..., O]``, the leading dimensions and dtype of x. The hidden activations are recomputed in backward.

    Without GRN, kernels compute it with gamma and beta of zero. That is the same number, unless the squares of an
    image's hidden activations overflow (beyond 1e19 in float32): then the whole image is NaN.
    """
    check.check_packed(x, layout)
    params = (w1, b1, gamma, beta, w2, b2)
    check_mlp(x, params, _out_channels(w2), layout, drop_path_scale, (scope, act), layer_scale)
    check.check_grn_eps(eps)
    if residual is not None:
        check.check_param(residual, "residual", (*x.shape[:-1], w2.shape[0]), x)
    dtype = gemm_dtype(x)
    if layer_scale is not None and dtype == torch.float16:
        y = pointwise_mlp(x, *params, layout, scope=scope, act=act, eps=eps)
        return scale_branch(y, layer_scale, residual, drop_path_scale, layout)

    def kernel(backend: str) -> Tensor:
        images = Segments.of(x, layout)
        folded = as_kernels_take(params, layer_scale, x)
        added = None if residual is None else residual.to(x.dtype).contiguous()
        save = schedule.save_policy(x.device.type)
        return _PointwiseMLP.apply(
            x.contiguous(), *folded, added, drop_path_scale, *images, scope == "batch", act, eps, save, dtype, backend
        )

    return dispatch(
        "pointwise_mlp",
        x,
        reference=lambda: reference.mlp.pointwise_mlp(
            x, *params, layout, residual, drop_path_scale, scope, act, eps, dtype, layer_scale
        ),
        kernel=kernel,
        gemm_dtype=dtype,
    )


class _GatheredMLP(torch.autograd.Function):
    """Takes the fields of :class:`GatheredMLPForwardArgs`."""

    @staticmethod
    def forward(ctx, *inputs):
        arguments = GatheredMLPForwardArgs._make(inputs)
        outputs = composite(_operators.gathered_mlp_forward, schedule.run_gathered_mlp_forward, arguments)
        _GatheredMLP.save(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def save(ctx, inputs, outputs):
        x, w1, b1, gamma, beta, w2, b2, ln_weight, ln_bias, residual, *index = inputs[:13]
        ctx.save_for_backward(x, w1, b1, gamma, beta, w2, ln_weight, ln_bias, *index, outputs[1])
        ctx.settings, ctx.b2_dtype, ctx.has_residual = inputs[13:], b2.dtype, residual is not None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _GatheredMLP.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        grad = grad.contiguous()
        arguments = GatheredMLPBackwardArgs(grad, *ctx.saved_tensors, *ctx.settings)
        grads = composite(_operators.gathered_mlp_backward, schedule.run_gathered_mlp_backward, arguments)
        dx, *norm_grads, dw1, db1, dgamma, dbeta, dw2, db2 = grads
        if arguments.layer_norm is None:
            norm_grads = [None, None]
        residual = grad if ctx.has_residual else None
        index = (None for _ in range(3 + len(ctx.settings)))
        return dx, dw1, db1, dgamma, dbeta, dw2, db2.to(ctx.b2_dtype), *norm_grads, residual, *index


_operators.differentiate("gathered_mlp_forward", _GatheredMLP)


def _check_gathered(
    x: Tensor,
    layer_norm: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    layout: PatchLayout,
    out_channels: int,
) -> None:
    """What :func:`pointwise_mlp` does not have."""
    ln_weight, ln_bias = layer_norm
    if (ln_weight is None) != (ln_bias is None):
        given, other = ("ln_weight", "ln_bias") if ln_bias is None else ("ln_bias", "ln_weight")
        raise ValueError(f"{other} must be a tensor [C] where {given} is given, got None")
    if ln_weight is not None and ln_bias is not None:
        check.check_param(ln_weight, "ln_weight", (x.shape[-1],), x)
        check.check_param(ln_bias, "ln_bias", (x.shape[-1],), x)
    if residual is not None:
        side = x.shape[1] // layout.grid[0]
        check.check_param(residual, "residual", (layout.num_patches, side, side, out_channels), x)


def gathered_pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout,
    residual: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    scope: str = "image",
    act: str = "gelu",
    eps: float = 1e-6,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    ln_eps: float = 1e-6,
) -> Tensor:
    """:func:`pointwise_mlp`, with LayerNorm in front of it if ``ln_weight`` is given, of the visible rows of a dense
    map, one autograd node: ``residual + drop_path_scale * MLP(LN(gather_patches(x, layout)))``.

    Args:
        x: dense ``[N, Gh*s, Gw*s, C]``; hidden rows are not read. layout: :class:`PatchLayout` of the same N images and
            grid. ln_weight, ln_bias: ``[C]``, both or neither; ln_eps: of LayerNorm. residual: packed
            ``[P, s, s, O]`` like the output. The rest as in :func:`pointwise_mlp`, without its layer scale.

    Returns:
        Packed rows ``[P, s, s, O]`` of x's dtype.

    LayerNorm reads the rows in the map and writes those of a chunk of images; without it the first GEMM reads them
    there, where it is a kernel of ours, or in a copy of the chunk, where it is a vendor's. Backward is given x itself,
    GRN's norms and the parameters, gathers again, and writes the gradient to its places in a map that is zero
    elsewhere. Neither way a packed copy of the batch exists besides the output. LayerNorm's mean and 1/std, as
    :func:`layer_norm_grn` keeps them, would save no byte: whoever normalises a row has it in registers anyway.

    Raises:
        TypeError: ``layout`` is not a PatchLayout.
        ValueError: x is not a map of the layout's images and grid, residual is not packed, or only one of ``ln_weight``
            and ``ln_bias`` is given.
    """
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout must be a PatchLayout, got {type(layout).__name__}")
    check.check_dense(x, layout)
    out_channels = _out_channels(w2)
    params = (w1, b1, gamma, beta, w2, b2)
    check_mlp(x, params, out_channels, layout, drop_path_scale, (scope, act), None)
    check.check_grn_eps(eps)
    check.check_eps(ln_eps, "ln_eps")
    _check_gathered(x, (ln_weight, ln_bias), residual, layout, out_channels)
    dtype = gemm_dtype(x)

    def plain() -> Tensor:
        packed = reference.patches.gather_patches(x, layout)
        if ln_weight is not None:
            packed = reference.norm.layer_norm(packed, ln_weight, ln_bias, ln_eps)
        return reference.mlp.pointwise_mlp(packed, *params, layout, residual, drop_path_scale, scope, act, eps, dtype)

    def kernel(backend: str) -> Tensor:
        return _GatheredMLP.apply(
            x.contiguous(),
            *as_kernels_take(params, None, x),
            ln_weight,
            ln_bias,
            None if residual is None else residual.to(x.dtype).contiguous(),
            drop_path_scale,
            layout.patch_of_slot,
            None if layout.patches_per_image is not None else layout.image_offsets,
            *layout.grid,
            scope == "batch",
            act,
            eps,
            ln_eps,
            dtype,
            backend,
        )

    return dispatch("gathered_pointwise_mlp", x, reference=plain, kernel=kernel, gemm_dtype=dtype)
