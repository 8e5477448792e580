"""The depthwise convolution over visible patches, alone and with LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..dtypes import as_statistics
from ..layout import PatchLayout
from . import _checks as check
from ._dispatch import dispatch, once_differentiable


def conv_radius(kernel_size: int, s: int) -> int:
    """How many patches away a K x K kernel reaches from a patch of side s."""
    return -(-(kernel_size // 2) // s)


def conv_neighbours(layout: PatchLayout | None, kernel_size: int, x: Tensor) -> Tensor | None:
    """Neighbour table a depthwise convolution of packed ``x`` needs; None for a dense map."""
    return None if layout is None else layout.neighbour_slots(conv_radius(kernel_size, x.shape[1]))


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, neighbours, backend):
        ctx.save_for_backward(x, weight, neighbours)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        w, b = as_statistics(weight, bias, like=x)
        return backends.get(backend).depthwise_conv_forward(x, w, b, None, neighbours)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        k = backends.get(ctx.backend)
        grad = grad.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            (w,) = as_statistics(weight, like=x)
            dx = k.depthwise_conv_forward(grad, w, None, None, neighbours, flip=True)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dw, db = k.depthwise_conv_backward_weight(grad, x, neighbours, weight.shape[-1])
            dw = dw.to(weight.dtype)
            db = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
        return dx, dw, db, None, None


class _DepthwiseConvLayerNorm(torch.autograd.Function):
    """Saves only x: backward runs the fused kernel again for the normalised rows."""

    @staticmethod
    def forward(ctx, x, weight, bias, ln_weight, ln_bias, neighbours, eps, backend):
        w, b, lw, lb = as_statistics(weight, bias, ln_weight, ln_bias, like=x)
        y, _ = backends.get(backend).depthwise_conv_normalize(x, w, b, neighbours, (lw, lb), eps)
        ctx.save_for_backward(x, weight, bias, ln_weight, neighbours)
        ctx.backend, ctx.eps, ctx.ln_bias_dtype = backend, eps, ln_bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, ln_weight, neighbours = ctx.saved_tensors
        k = backends.get(ctx.backend)
        w, b, lw = as_statistics(weight, bias, ln_weight, like=x)
        z, rstd = k.depthwise_conv_normalize(x, w, b, neighbours, (None, None), ctx.eps)
        dy, dln_weight, dln_bias = k.normalized_backward(grad.contiguous(), z, rstd, lw)
        dx = k.depthwise_conv_forward(dy, w, None, None, neighbours, flip=True) if ctx.needs_input_grad[0] else None
        dw, db = k.depthwise_conv_backward_weight(dy, x, neighbours, weight.shape[-1])
        assert dln_weight is not None and dln_bias is not None
        norm = dln_weight.to(ln_weight.dtype), dln_bias.to(ctx.ln_bias_dtype)
        return dx, dw.to(weight.dtype), None if bias is None else db.to(bias.dtype), *norm, None, None, None


def submanifold_depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, layout: PatchLayout | None = None
) -> Tensor:
    """Depthwise K x K convolution, stride 1, that neither reads nor writes hidden pixels (paper section 3).

    Args:
        x: packed ``[P, s, s, C]``, or a dense map ``[N, H, W, C]`` of any size when ``layout`` is None.
        weight: ``[C, 1, K, K]``, K odd, 3..11. bias: ``[C]`` or None.

    Returns:
        The shape and dtype of x, accumulated in float32 (float64 for float64). Hidden and outside pixels count as 0.
    """
    check.check_packed(x, layout)
    check.check_depthwise_weight(weight, bias, x)
    return dispatch(
        "submanifold_depthwise_conv2d",
        x,
        reference=lambda: reference.conv.depthwise_conv2d(x, weight, bias, layout),
        kernel=lambda backend: _DepthwiseConv.apply(
            x.contiguous(), weight, bias, conv_neighbours(layout, weight.shape[-1], x), backend
        ),
    )


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    layout: PatchLayout | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm over the channels of :func:`submanifold_depthwise_conv2d`, fused: the convolution's output is never
    stored. ``ln_weight``, ``ln_bias``: ``[C]``. Shapes and dtypes as there."""
    check.check_packed(x, layout)
    check.check_depthwise_weight(weight, bias, x)
    check.check_param(ln_weight, "ln_weight", (x.shape[-1],), x)
    check.check_param(ln_bias, "ln_bias", (x.shape[-1],), x)
    check.check_eps(eps)
    return dispatch(
        "depthwise_conv_layer_norm",
        x,
        reference=lambda: reference.norm.layer_norm(
            reference.conv.depthwise_conv2d(x, weight, bias, layout), ln_weight, ln_bias, eps
        ),
        kernel=lambda backend: _DepthwiseConvLayerNorm.apply(
            x.contiguous(), weight, bias, ln_weight, ln_bias, conv_neighbours(layout, weight.shape[-1], x), eps, backend
        ),
    )
