"""The pointwise MLP with GRN, one autograd node over the chunked schedule."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .. import schedule
from ..backends import reference
from ..dtypes import as_statistics, gemm_dtype, statistics_dtype
from ..layout import PatchLayout
from ..params import MLPBackwardArgs, MLPForwardArgs, Segments
from . import _checks as check
from . import _operators
from ._dispatch import composite, dispatch, once_differentiable
from .patches import gather_patches

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
    check.check_float(w2, "w2")
    if w2.dim() != 2 or w2.shape[0] < 1:
        raise ValueError(f"w2 has shape {list(w2.shape)}, expected [out_channels, hidden]")
    params = (w1, b1, gamma, beta, w2, b2)
    check_mlp(x, params, w2.shape[0], layout, drop_path_scale, (scope, act), layer_scale)
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


def gathered_pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout,
    residual: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    scope: str = "image",
    act: str = "gelu",
    eps: float = 1e-6,
) -> Tensor:
    """:func:`pointwise_mlp` of the visible rows of a dense map ``x [N, Gh*s, Gw*s, C]``; hidden rows are not read.

    Returns packed rows ``[P, s, s, O]``; ``residual``, if given, is packed like the output.
    """
    packed = gather_patches(x, layout)
    return pointwise_mlp(packed, w1, b1, gamma, beta, w2, b2, layout, residual, drop_path_scale, scope, act, eps)
