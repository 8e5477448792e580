"""Gather and scatter between dense maps and packed patches, and the depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.reference import conv as ref
from ..backends.reference import norm as ref_rows
from ..dtypes import no_autocast, stat_params
from ..layout import PatchLayout
from . import _checks as check
from ._dispatch import once_differentiable


def conv_radius(kernel_size: int, s: int) -> int:
    """How many patches away a K x K kernel reaches from a patch of side s."""
    return -(-(kernel_size // 2) // s)


def conv_neighbours(layout: PatchLayout | None, kernel_size: int, x: Tensor) -> Tensor | None:
    """Neighbour table a depthwise convolution of packed ``x`` needs; None for a dense map."""
    return None if layout is None else layout.neighbour_slots(conv_radius(kernel_size, x.shape[1]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, patch_of_slot, slot_of_patch, gh, gw, backend):
        ctx.save_for_backward(slot_of_patch)
        ctx.grid, ctx.backend = (gh, gw), backend
        return backends.primitives(backend).gather_patches(x, patch_of_slot, gh, gw)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slots,) = ctx.saved_tensors
        dx = backends.primitives(ctx.backend).scatter_patches(grad.contiguous(), slots, *ctx.grid, None)
        return dx, None, None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fill, patch_of_slot, slot_of_patch, gh, gw, backend):
        ctx.save_for_backward(patch_of_slot, slot_of_patch)
        ctx.grid, ctx.backend = (gh, gw), backend
        ctx.fill_dtype = None if fill is None else fill.dtype
        if fill is not None:
            fill = fill.to(x.dtype).contiguous()
        return backends.primitives(backend).scatter_patches(x, slot_of_patch, gh, gw, fill)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        patches, slots = ctx.saved_tensors
        k = backends.primitives(ctx.backend)
        grad = grad.contiguous()
        dx = k.gather_patches(grad, patches, *ctx.grid)
        dfill = None
        if ctx.needs_input_grad[1]:
            gh, gw = ctx.grid
            n, h, w, c = grad.shape
            sites = grad.view(n, gh, h // gh, gw, w // gw, c)
            hidden = (slots < 0).view(n, gh, 1, gw, 1, 1)
            # chosen, not multiplied: a NaN at a visible site stays there
            total = torch.where(hidden, sites, 0).sum((0, 1, 2, 3, 4), dtype=ref_rows.statistics_dtype(grad.dtype))
            dfill = total.to(ctx.fill_dtype)
        return dx, dfill, None, None, None, None, None


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, neighbours, backend):
        ctx.save_for_backward(x, weight, neighbours)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        w, b = stat_params(weight, bias, like=x)
        return backends.primitives(backend).depthwise_conv_forward(x, w, b, None, neighbours, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        k = backends.primitives(ctx.backend)
        grad = grad.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            (w,) = stat_params(weight, like=x)
            dx = k.depthwise_conv_forward(grad, w, None, None, neighbours, True)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dw, db = k.depthwise_conv_backward_weight(grad, x, neighbours, weight.shape[-1])
            dw = dw.to(weight.dtype)
            db = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
        return dx, dw, db, None, None


class _DepthwiseConvLayerNorm(torch.autograd.Function):
    """Keeps only x: backward runs the fused kernel again for the normalised rows."""

    @staticmethod
    def forward(ctx, x, weight, bias, ln_weight, ln_bias, neighbours, eps, backend):
        params = stat_params(weight, bias, ln_weight, ln_bias, like=x)
        y, _ = backends.primitives(backend).depthwise_conv_normalize(x, *params[:2], neighbours, *params[2:], eps)
        ctx.save_for_backward(x, weight, bias, ln_weight, neighbours)
        ctx.backend, ctx.eps, ctx.ln_bias_dtype = backend, eps, ln_bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, ln_weight, neighbours = ctx.saved_tensors
        k = backends.primitives(ctx.backend)
        w, b, gain = stat_params(weight, bias, ln_weight, like=x)
        z, rstd = k.depthwise_conv_normalize(x, w, b, neighbours, None, None, ctx.eps)
        dy, dgain, dshift = k.normalized_backward(grad.contiguous(), z, rstd, gain)
        dx = k.depthwise_conv_forward(dy, w, None, None, neighbours, True) if ctx.needs_input_grad[0] else None
        dw, db = k.depthwise_conv_backward_weight(dy, x, neighbours, weight.shape[-1])
        db = None if bias is None else db.to(bias.dtype)
        return (dx, dw.to(weight.dtype), db, dgain.to(ln_weight.dtype), dshift.to(ctx.ln_bias_dtype), None, None, None)


def gather_patches(x: Tensor, layout: PatchLayout) -> Tensor:
    """Pack the visible patches of a dense map.

    Args:
        x: ``[N, Gh*s, Gw*s, C]`` NHWC. layout: :class:`PatchLayout` of the same N images and grid.

    Returns:
        ``[P, s, s, C]`` of x's dtype. Hidden sites are not read.
    """
    check.check_dense(x, layout)
    backend = backends.select(x, "gather_patches")
    if backend == "reference":
        return ref.gather_patches(x, layout)
    return _Gather.apply(x.contiguous(), layout.patch_of_slot, layout.slot_of_patch, *layout.grid, backend)


def scatter_patches(x: Tensor, layout: PatchLayout, fill: Tensor | None = None) -> Tensor:
    """Unpack patches into a dense map.

    Args:
        x: packed ``[P, s, s, C]``. fill: C values for hidden sites (any shape with C elements), zero if None.

    Returns:
        ``[N, Gh*s, Gw*s, C]`` of x's dtype.
    """
    check.check_packed(x, layout)
    if layout is None:
        raise ValueError("layout must be a PatchLayout, got None")
    if fill is not None:
        check.check_param(fill, "fill", x.shape[-1], x)
        fill = fill.reshape(-1)
    backend = backends.select(x, "scatter_patches")
    if backend == "reference":
        return ref.scatter_patches(x, layout, fill)
    return _Scatter.apply(x.contiguous(), fill, layout.patch_of_slot, layout.slot_of_patch, *layout.grid, backend)


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
    backend = backends.select(x, "submanifold_depthwise_conv2d")
    with no_autocast(x):
        if backend == "reference":
            return ref.depthwise_conv2d(x, weight, bias, layout)
        table = conv_neighbours(layout, weight.shape[-1], x)
        return _DepthwiseConv.apply(x.contiguous(), weight, bias, table, backend)


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
    backend = backends.select(x, "depthwise_conv_layer_norm")
    with no_autocast(x):
        if backend == "reference":
            y = ref.depthwise_conv2d(x, weight, bias, layout)
            return ref_rows.layer_norm(y, ln_weight, ln_bias, eps)
        table = conv_neighbours(layout, weight.shape[-1], x)
        return _DepthwiseConvLayerNorm.apply(x.contiguous(), weight, bias, ln_weight, ln_bias, table, eps, backend)
