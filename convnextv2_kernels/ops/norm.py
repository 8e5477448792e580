"""LayerNorm, GRN, and the two fused."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..dtypes import as_statistics
from ..layout import PatchLayout
from ..params import NormParams, Segments
from . import _checks as check
from ._dispatch import dispatch, no_autocast, once_differentiable, require_reference
from ._grn_variant import GRNVariant


def _like(grad: Tensor | None, dtype: torch.dtype | None, shape=None) -> Tensor | None:
    if grad is None or dtype is None:
        return None
    grad = grad.to(dtype)
    return grad if shape is None else grad.reshape(shape)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, backend):
        w, b = as_statistics(weight, bias, like=x)
        y, mean, rstd = backends.get(backend).layer_norm_forward(x, w, b, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, weight = ctx.saved_tensors
        (w,) = as_statistics(weight, like=x)
        k = backends.get(ctx.backend)
        dx, dw, db = k.layer_norm_backward(grad.contiguous(), x, mean, rstd, w)
        wdtype = None if weight is None else weight.dtype
        return dx, _like(dw, wdtype), _like(db, ctx.bias_dtype), None, None


class _GlobalResponseNorm(torch.autograd.Function):
    """GRN, or GRN(GELU(x)) with ``gelu``; saves the input and one norm per image and channel."""

    @staticmethod
    def forward(ctx, x, gamma, beta, images, gelu, eps, backend):
        g, b = as_statistics(gamma.reshape(-1), beta.reshape(-1), like=x)
        y, norm = backends.get(backend).grn_forward(x, g, b, images, gelu, eps)
        ctx.save_for_backward(x, gamma, norm, images.offsets)
        ctx.segments, ctx.args = images[1:], (gelu, eps)
        ctx.backend, ctx.beta = backend, (beta.dtype, beta.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gamma, norm, offsets = ctx.saved_tensors
        (g,) = as_statistics(gamma.reshape(-1), like=x)
        k = backends.get(ctx.backend)
        dx, dgamma, dbeta = k.grn_backward(grad.contiguous(), x, g, norm, Segments(offsets, *ctx.segments), *ctx.args)
        return dx, _like(dgamma, gamma.dtype, gamma.shape), _like(dbeta, *ctx.beta), None, None, None, None


class _LayerNormGRN(torch.autograd.Function):
    """GRN(LN(x)): saves x and the statistics of both norms."""

    @staticmethod
    def forward(ctx, x, ln_weight, ln_bias, gamma, beta, images, both_eps, backend):
        w, b, g, b2 = as_statistics(ln_weight, ln_bias, gamma.reshape(-1), beta.reshape(-1), like=x)
        y, *statistics = backends.get(backend).layer_norm_grn_forward(x, NormParams(w, b), g, b2, images, *both_eps)
        ctx.save_for_backward(x, *statistics, ln_weight, ln_bias, gamma, images.offsets)
        ctx.segments, ctx.eps = images[1:], both_eps[1]
        ctx.backend, ctx.beta = backend, (beta.dtype, beta.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *statistics, ln_weight, ln_bias, gamma, offsets = ctx.saved_tensors
        w, b, g = as_statistics(ln_weight, ln_bias, gamma.reshape(-1), like=x)
        images = Segments(offsets, *ctx.segments)
        dx, dw, db, dgamma, dbeta = backends.get(ctx.backend).layer_norm_grn_backward(
            grad.contiguous(), x, tuple(statistics), NormParams(w, b), g, images, ctx.eps
        )
        dw, db = dw.to(ln_weight.dtype), db.to(ln_bias.dtype)
        return dx, dw, db, _like(dgamma, gamma.dtype, gamma.shape), _like(dbeta, *ctx.beta), None, None, None


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
    return dispatch(
        "layer_norm",
        x,
        reference=lambda: reference.norm.layer_norm(x, weight, bias, eps),
        kernel=lambda backend: _LayerNorm.apply(x.contiguous(), weight, bias, eps, backend),
    )


def _check_grn(x, gamma, beta, layout, scope, eps):
    check.check_packed(x, layout)
    check.check_param(gamma, "gamma", x.shape[-1], x)
    check.check_param(beta, "beta", x.shape[-1], x)
    check.check_scope(scope)
    check.check_grn_eps(eps)


def global_response_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layout: PatchLayout | None = None,
    scope: str = "image",
    eps: float = 1e-6,
    variant: str | GRNVariant = "default",
) -> Tensor:
    """Global response normalisation ``x + gamma * (x * N(G(x))) + beta`` (paper Equations 1-3).

    Args:
        x: packed ``[P, s, s, C]``, or dense ``[N, H, W, C]`` when ``layout`` is None.
        gamma, beta: C elements in any shape. eps: added to the mean of the norms.
        scope: "image" takes the L2 norm over an image's visible pixels (the paper); "batch" over those of the
            whole batch (the official sparse code).
        variant: an ablation of the formula, :class:`~convnextv2_kernels.nn.GRNVariant` or its text; one without kernels
            runs in plain PyTorch.

    Returns:
        The shape and dtype of x. Sums of squares are float32 or float64; a channel of zero norm passes unscaled.

    Raises:
        ValueError: ``variant`` is another layer than GRN.
        RuntimeError: a variant that only the reference has, and another backend is forced.
    """
    variant = GRNVariant.of(variant)
    if variant.layer != "grn":
        raise ValueError(f"variant must be a formula of GRN, got {str(variant)!r}, a layer with parameters of its own")
    _check_grn(x, gamma, beta, layout, scope, eps)
    if not variant.enabled:  # not the formula with zeros, in which an infinity makes the whole image NaN
        return x.clone(memory_format=torch.contiguous_format)
    if not variant.fused:
        require_reference(f"the GRN variant '{variant}'")
        with no_autocast(x):
            return reference.grn_variants.global_response_norm(x, gamma, beta, layout, scope, eps, *variant.formula)
    return dispatch(
        "global_response_norm",
        x,
        reference=lambda: reference.norm.global_response_norm(x, gamma, beta, layout, scope, eps),
        kernel=lambda backend: _GlobalResponseNorm.apply(
            x.contiguous(), gamma, beta, Segments.of(x, layout, scope), False, eps, backend
        ),
    )


def gelu_grn(
    x: Tensor, gamma: Tensor, beta: Tensor, layout: PatchLayout | None = None, scope: str = "image", eps: float = 1e-6
) -> Tensor:
    """GRN(GELU(x)) with the exact GELU, fused; arguments as :func:`global_response_norm`."""
    _check_grn(x, gamma, beta, layout, scope, eps)
    return dispatch(
        "gelu_grn",
        x,
        reference=lambda: reference.norm.gelu_grn(x, gamma, beta, layout, scope, eps),
        kernel=lambda backend: _GlobalResponseNorm.apply(
            x.contiguous(), gamma, beta, Segments.of(x, layout, scope), True, eps, backend
        ),
    )


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
    """GRN(LN(x)), fused: two passes over x, and two over its gradient and x, of which only the statistics of both norms
    are kept. ``ln_weight``, ``ln_bias``: ``[C]``, the rest as :func:`global_response_norm`."""
    _check_grn(x, gamma, beta, layout, scope, eps)
    check.check_param(ln_weight, "ln_weight", (x.shape[-1],), x)
    check.check_param(ln_bias, "ln_bias", (x.shape[-1],), x)
    check.check_eps(ln_eps, "ln_eps")
    return dispatch(
        "layer_norm_grn",
        x,
        reference=lambda: reference.norm.layer_norm_grn(x, ln_weight, ln_bias, gamma, beta, layout, scope, ln_eps, eps),
        kernel=lambda backend: _LayerNormGRN.apply(
            x.contiguous(), ln_weight, ln_bias, gamma, beta, Segments.of(x, layout, scope), (ln_eps, eps), backend
        ),
    )
