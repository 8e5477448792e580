"""Ops on rows: LayerNorm, GRN, their fusions, and the downsampling layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.reference import norm as ref
from ..dtypes import no_autocast, product_dtype, stat_params
from ..layout import PatchLayout
from . import _checks as check
from . import _operators
from ._dispatch import once_differentiable


def segment_args(x: Tensor, layout: PatchLayout | None, scope: str) -> tuple[Tensor | None, int, int]:
    """How rows fall into GRN segments: ``(image_offsets or None when uniform, rows per slot, segments)``."""
    if scope == "batch":
        return None, 1, 1
    if layout is None:
        return None, 1, x.shape[0]
    rows_per_slot = x.shape[1] * x.shape[2]
    offsets = None if layout.patches_per_image is not None else layout.image_offsets
    return offsets, rows_per_slot, layout.num_images


def _like(grad: Tensor | None, dtype: torch.dtype | None, shape=None) -> Tensor | None:
    if grad is None or dtype is None:
        return None
    grad = grad.to(dtype)
    return grad if shape is None else grad.reshape(shape)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, backend):
        w, b = stat_params(weight, bias, like=x)
        y, mean, rstd = backends.primitives(backend).layer_norm_forward(x, w, b, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, weight = ctx.saved_tensors
        (w,) = stat_params(weight, like=x)
        k = backends.primitives(ctx.backend)
        dx, dw, db = k.layer_norm_backward(grad.contiguous(), x, mean, rstd, w)
        wdtype = None if weight is None else weight.dtype
        return dx, _like(dw, wdtype), _like(db, ctx.bias_dtype), None, None


class _GlobalResponseNorm(torch.autograd.Function):
    """GRN, or GRN(GELU(x)) with ``gelu``; keeps the input and one norm per image and channel."""

    @staticmethod
    def forward(ctx, x, gamma, beta, offsets, rows_per_slot, segments, gelu, eps, backend):
        g, b = stat_params(gamma.reshape(-1), beta.reshape(-1), like=x)
        segs = (offsets, rows_per_slot, segments)
        y, norm = backends.primitives(backend).grn_forward(x, g, b, *segs, gelu, eps)
        ctx.save_for_backward(x, gamma, norm, offsets)
        ctx.args = (rows_per_slot, segments, gelu, eps)
        ctx.backend, ctx.beta = backend, (beta.dtype, beta.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gamma, norm, offsets = ctx.saved_tensors
        (g,) = stat_params(gamma.reshape(-1), like=x)
        k = backends.primitives(ctx.backend)
        dx, dgamma, dbeta = k.grn_backward(grad.contiguous(), x, g, norm, offsets, *ctx.args)
        dgamma = _like(dgamma, gamma.dtype, gamma.shape)
        return dx, dgamma, _like(dbeta, *ctx.beta), None, None, None, None, None, None


class _LayerNormGRN(torch.autograd.Function):
    """GRN(LN(x)): keeps x and the statistics of both norms; LN(x) is recomputed in backward."""

    @staticmethod
    def forward(ctx, x, ln_weight, ln_bias, gamma, beta, offsets, rows_per_slot, segments, ln_eps, eps, backend):
        k = backends.primitives(backend)
        w, b, g, shift = stat_params(ln_weight, ln_bias, gamma.reshape(-1), beta.reshape(-1), like=x)
        y, mean, rstd = k.layer_norm_forward(x, w, b, ln_eps)
        out, norm = k.grn_forward(y, g, shift, offsets, rows_per_slot, segments, False, eps)
        ctx.save_for_backward(x, mean, rstd, ln_weight, ln_bias, gamma, norm, offsets)
        ctx.args = (rows_per_slot, segments, False, eps)
        ctx.backend, ctx.beta = backend, (beta.dtype, beta.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, ln_weight, ln_bias, gamma, norm, offsets = ctx.saved_tensors
        k = backends.primitives(ctx.backend)
        w, b, g = stat_params(ln_weight, ln_bias, gamma.reshape(-1), like=x)
        shape = (*mean.shape, 1)
        # the same arithmetic as forward up to rounding: (x - mean) * rstd * w + b
        y = ((x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape) * w + b).to(x.dtype)
        dy, dgamma, dbeta = k.grn_backward(grad.contiguous(), y, g, norm, offsets, *ctx.args)
        dx, dw, db = k.layer_norm_backward(dy, x, mean, rstd, w)
        dw, db = dw.to(ln_weight.dtype), db.to(ln_bias.dtype)
        dgamma = _like(dgamma, gamma.dtype, gamma.shape)
        return dx, dw, db, dgamma, _like(dbeta, *ctx.beta), None, None, None, None, None, None


class _Linear(torch.autograd.Function):
    """``x W' + b`` with operands in ``dtype``; the output has x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype, backend):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ctx.save_for_backward(rows, weight)
        ctx.backend, ctx.shape, ctx.dtype = backend, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        b = None if bias is None else bias.to(dtype)
        return _operators.product(rows, weight.to(dtype), b, backend).to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        k = backends.primitives(ctx.backend)
        g = grad.reshape(-1, grad.shape[-1])
        db = None if ctx.bias_dtype is None else k.column_sum(g.contiguous()).to(ctx.bias_dtype)
        g = g.to(rows.dtype).contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _operators.product_input_grad(g, weight.to(rows.dtype), ctx.backend).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = _operators.product_weight_grad(g, rows, ctx.backend).to(weight.dtype)
        return dx, dw, db, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., C] @ weight [O, C]' + bias [O]`` by the backend's matrix-product library; the dtype of x.

    Under autocast the operands are cast as the AMP table says (``dtypes.py``).
    """
    check.check_float(x, "x")
    check.check_float(weight, "weight")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [O, {x.shape[-1]}]")
    check.check_param(weight, "weight", (weight.shape[0], x.shape[-1]), x)
    if bias is not None:
        check.check_param(bias, "bias", (weight.shape[0],), x)
    dtype = product_dtype(x)
    backend = backends.select(x, "linear", dtype)
    with no_autocast(x):
        if backend == "reference":
            return ref.linear(x, weight, bias, dtype)
        return _Linear.apply(x, weight, bias, dtype, backend)


class _Downsample(torch.autograd.Function):
    """LayerNorm and 2x2/2 convolution as one product; keeps only x and normalises it again in backward."""

    @staticmethod
    def forward(ctx, x, ln_weight, ln_bias, weight, bias, eps, dtype, backend):
        k = backends.primitives(backend)
        y, _ = k.space_to_depth_normalize(x, *stat_params(ln_weight, ln_bias, like=x), eps)
        b = None if bias is None else bias.to(dtype)
        rows = y.view(-1, y.shape[-1]).to(dtype)
        out = _operators.product(rows, _pixel_major(weight).to(dtype), b, backend)
        ctx.save_for_backward(x, ln_weight, ln_bias, weight)
        ctx.backend, ctx.eps, ctx.dtype = backend, eps, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(x.dtype).view(*y.shape[:3], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, ln_weight, ln_bias, weight = ctx.saved_tensors
        k = backends.primitives(ctx.backend)
        out_c, c = weight.shape[0], weight.shape[1]
        gain, shift = stat_params(ln_weight, ln_bias, like=x)
        z, rstd = k.space_to_depth_normalize(x, None, None, ctx.eps)
        y = torch.addcmul(shift.to(x.dtype), z.view(-1, 4, c), gain.to(x.dtype)).view(-1, 4 * c)
        g = grad.reshape(-1, out_c).contiguous()
        db = None if ctx.bias_dtype is None else k.column_sum(g).to(ctx.bias_dtype)
        g = g.to(ctx.dtype)
        dy = _operators.product_input_grad(g, _pixel_major(weight).to(ctx.dtype), ctx.backend)
        dx, dgain, dshift = k.space_to_depth_normalize_backward(dy.to(x.dtype).view(z.shape), z, rstd, gain)
        dw = _operators.product_weight_grad(g, y.to(ctx.dtype), ctx.backend)
        dw = dw.view(out_c, 4, c).transpose(1, 2).reshape(weight.shape).to(weight.dtype)
        return dx, dgain.to(ln_weight.dtype), dshift.to(ln_bias.dtype), dw, db, None, None, None


def _pixel_major(weight: Tensor) -> Tensor:
    """2x2 kernel ``[O, C, 2, 2]`` -> matrix ``[O, 4*C]`` over (pixel, channel), the order of the normalised rows."""
    out_c, c = weight.shape[0], weight.shape[1]
    return weight.reshape(out_c, c, 4).transpose(1, 2).reshape(out_c, 4 * c)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension, biased variance.

    Args:
        x: ``[..., C]``. weight, bias: ``[C]`` or None.

    Returns:
        The shape and dtype of x; mean and 1/std are kept in float32 (float64 for float64).
    """
    check.check_float(x, "x")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., C] with C >= 1")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check.check_param(p, name, (x.shape[-1],), x)
    check.check_eps(eps)
    backend = backends.select(x, "layer_norm")
    with no_autocast(x):
        if backend == "reference":
            return ref.layer_norm(x, weight, bias, eps)
        return _LayerNorm.apply(x.contiguous(), weight, bias, eps, backend)


def _check_grn(x, gamma, beta, layout, scope, eps):
    check.check_packed(x, layout)
    check.check_param(gamma, "gamma", x.shape[-1], x)
    check.check_param(beta, "beta", x.shape[-1], x)
    check.check_scope(scope)
    check.check_grn_eps(eps)


def global_response_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, layout: PatchLayout | None = None, scope: str = "image", eps: float = 1e-6
) -> Tensor:
    """Global response normalisation ``x + gamma * (x * N(G(x))) + beta`` (paper Equations 1-3).

    Args:
        x: packed ``[P, s, s, C]``, or dense ``[N, H, W, C]`` when ``layout`` is None.
        gamma, beta: C elements in any shape. eps: added to the mean of the norms.
        scope: "image" takes the L2 norm over an image's visible pixels (the paper); "batch" over those of the
            whole batch (the official sparse code).

    Returns:
        The shape and dtype of x. Sums of squares are float32 or float64; a channel of zero norm passes unscaled.
    """
    _check_grn(x, gamma, beta, layout, scope, eps)
    backend = backends.select(x, "global_response_norm")
    with no_autocast(x):
        if backend == "reference":
            return ref.global_response_norm(x, gamma, beta, layout, scope, eps)
        segs = segment_args(x, layout, scope)
        return _GlobalResponseNorm.apply(x.contiguous(), gamma, beta, *segs, False, eps, backend)


def gelu_grn(
    x: Tensor, gamma: Tensor, beta: Tensor, layout: PatchLayout | None = None, scope: str = "image", eps: float = 1e-6
) -> Tensor:
    """GRN(GELU(x)) with the exact GELU, fused; arguments as :func:`global_response_norm`."""
    _check_grn(x, gamma, beta, layout, scope, eps)
    backend = backends.select(x, "gelu_grn")
    with no_autocast(x):
        if backend == "reference":
            return ref.gelu_grn(x, gamma, beta, layout, scope, eps)
        segs = segment_args(x, layout, scope)
        return _GlobalResponseNorm.apply(x.contiguous(), gamma, beta, *segs, True, eps, backend)


def layer_norm_grn(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layout: PatchLayout | None = None,
    scope: str = "image",
    ln_eps: float = 1e-6,
    eps: float = 1e-6,
) -> Tensor:
    """GRN(LN(x)), fused; ``ln_weight``, ``ln_bias``: ``[C]``, the rest as :func:`global_response_norm`."""
    _check_grn(x, gamma, beta, layout, scope, eps)
    check.check_param(ln_weight, "ln_weight", (x.shape[-1],), x)
    check.check_param(ln_bias, "ln_bias", (x.shape[-1],), x)
    check.check_eps(ln_eps, "ln_eps")
    backend = backends.select(x, "layer_norm_grn")
    with no_autocast(x):
        if backend == "reference":
            return ref.layer_norm_grn(x, ln_weight, ln_bias, gamma, beta, layout, scope, ln_eps, eps)
        segs = segment_args(x, layout, scope)
        return _LayerNormGRN.apply(x.contiguous(), ln_weight, ln_bias, gamma, beta, *segs, ln_eps, eps, backend)


def downsample(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """LayerNorm, then 2x2 convolution of stride 2; needs no layout, as it never crosses a patch.

    Args:
        x: ``[P, s, s, C]`` packed or ``[N, H, W, C]`` dense, sides of at least 2. weight: ``[O, C, 2, 2]``.
            bias: ``[O]``.

    Returns:
        ``[P, s/2, s/2, O]`` (or ``[N, H//2, W//2, O]``) of x's dtype. As in PyTorch's convolution the last row or
        column of an odd side has no part in it; leaving it out costs a copy of x.
    """
    check.check_packed(x, None)
    if min(x.shape[1:3]) < 2:
        raise ValueError(f"x has shape {list(x.shape)}, expected sides of at least 2 in dimensions 1 and 2")
    c = x.shape[-1]
    check.check_float(weight, "weight")
    if weight.dim() != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [O, {c}, 2, 2]")
    check.check_param(weight, "weight", (weight.shape[0], c, 2, 2), x)
    check.check_param(ln_weight, "ln_weight", (c,), x)
    check.check_param(ln_bias, "ln_bias", (c,), x)
    if bias is not None:
        check.check_param(bias, "bias", (weight.shape[0],), x)
    check.check_eps(eps)
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    dtype = product_dtype(x)
    backend = backends.select(x, "downsample", dtype)
    with no_autocast(x):
        if backend == "reference":
            return ref.downsample(x, ln_weight, ln_bias, weight, bias, eps, dtype)
        return _Downsample.apply(x.contiguous(), ln_weight, ln_bias, weight, bias, eps, dtype, backend)
