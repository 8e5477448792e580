"""The pointwise MLP with GRN and the whole ConvNeXt V2 block, each one autograd node over the chunked schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, schedule
from ..backends.reference import norm as ref
from ..dtypes import no_autocast, product_dtype
from ..layout import PatchLayout
from . import _checks as check
from . import _operators
from ._dispatch import once_differentiable
from .conv import conv_neighbours, gather_patches
from .norm import segment_args

ACTIVATIONS = ("gelu", "gelu_tanh")


class _PointwiseMLP(torch.autograd.Function):
    """``args`` are the operators' arguments behind the tensors."""

    TENSORS = 10

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, args = inputs
        outputs = _operators.mlp_forward(*tensors, *args)
        _PointwiseMLP.keep(ctx, tensors, args, outputs)
        return outputs[0]

    @staticmethod
    def keep(ctx, tensors, args, outputs):
        x, w1, b1, gamma, beta, w2, b2, residual, drop, offsets = tensors
        ctx.save_for_backward(x, w1, b1, gamma, beta, w2, drop, offsets, *outputs[1:])
        ctx.args, ctx.b2_dtype, ctx.has_residual = args, b2.dtype, residual is not None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        dx, *grads, db2 = _operators.mlp_backward(grad, *ctx.saved_tensors, *ctx.args)
        residual = grad if ctx.has_residual else None
        return dx, *grads, db2.to(ctx.b2_dtype), residual, None, None, None


class _Block(torch.autograd.Function):
    TENSORS = 14

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, args = inputs
        outputs = _operators.block_forward(*tensors, *args)
        _Block.keep(ctx, tensors, args, outputs)
        return outputs[0]

    @staticmethod
    def keep(ctx, tensors, args, outputs):
        x, dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, gamma, beta, w2, b2, *index = tensors
        params = (dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, gamma, beta, w2)
        ctx.save_for_backward(x, *outputs[1:], *params, *index)
        ctx.args, ctx.b2_dtype = args, b2.dtype
        ctx.dw_bias_dtype = None if dw_bias is None else dw_bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = _operators.block_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.args)
        dx, ddw, ddb, *rest, db2 = grads
        ddb = None if ctx.dw_bias_dtype is None else ddb.to(ctx.dw_bias_dtype)
        return dx, ddw, ddb, *rest, db2.to(ctx.b2_dtype), None, None, None, None


# For programs of torch.export, which hold the operators without the functions around them.
_operators.differentiate("mlp_forward", _PointwiseMLP)
_operators.differentiate("block_forward", _Block)


def _geometry(x: Tensor, layout: PatchLayout | None, scope: str) -> tuple[Tensor | None, tuple]:
    """Image offsets (None when uniform) and the integers that describe how rows fall into images."""
    offsets, rows_per_slot, images = segment_args(x, layout, "image")
    return offsets, (rows_per_slot, images, scope == "batch")


def _check_mlp(x, w1, b1, gamma, beta, w2, b2, out_c, layout, drop_path_scale, scope, act):
    c = x.shape[-1]
    check.check_float(w1, "w1")
    if w1.dim() != 2:
        raise ValueError(f"w1 has shape {list(w1.shape)}, expected [hidden, {c}]")
    hidden = w1.shape[0]
    if hidden < 1:
        raise ValueError(f"w1 has shape {list(w1.shape)}, expected [hidden, {c}] with hidden >= 1")
    check.check_param(w1, "w1", (hidden, c), x)
    check.check_param(b1, "b1", (hidden,), x)
    check.check_param(gamma, "gamma", hidden, x)
    check.check_param(beta, "beta", hidden, x)
    check.check_param(w2, "w2", (out_c, hidden), x)
    check.check_param(b2, "b2", (out_c,), x)
    check.check_scope(scope)
    check.check_drop_path(drop_path_scale, x.shape[0] if layout is None else layout.num_images, x)
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


def pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None = None,
    residual: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    scope: str = "image",
    act: str = "gelu",
    eps: float = 1e-6,
) -> Tensor:
    """``residual + drop_path_scale * (GRN(GELU(x W1' + b1)) W2' + b2)`` (paper Figure 5), one autograd node.

    Args:
        x: packed ``[P, s, s, C]``, or dense ``[N, H, W, C]`` when ``layout`` is None.
        w1: ``[H, C]``, b1: ``[H]``; gamma, beta: H elements; w2: ``[O, H]``, b2: ``[O]``.
        residual: ``[..., O]`` like the output, or None. drop_path_scale: ``[N]``, one constant factor per image.
        scope, eps: of GRN, see :func:`global_response_norm`. act: "gelu" (exact) or "gelu_tanh", PyTorch's
            ``approximate="tanh"``.

    Returns:
        ``[..., O]``, the leading dimensions and dtype of x. The hidden activations are recomputed in backward.
    """
    check.check_packed(x, layout)
    check.check_float(w2, "w2")
    if w2.dim() != 2 or w2.shape[0] < 1:
        raise ValueError(f"w2 has shape {list(w2.shape)}, expected [out_channels, hidden]")
    out_c = w2.shape[0]
    _check_mlp(x, w1, b1, gamma, beta, w2, b2, out_c, layout, drop_path_scale, scope, act)
    check.check_grn_eps(eps)
    if residual is not None:
        check.check_param(residual, "residual", (*x.shape[:-1], out_c), x)
    dtype = product_dtype(x)
    backend = backends.select(x, "pointwise_mlp", dtype)
    with no_autocast(x):
        if backend == "reference":
            return ref.pointwise_mlp(
                x, w1, b1, gamma, beta, w2, b2, layout, residual, drop_path_scale, scope, act, eps, dtype
            )
        offsets, geometry = _geometry(x, layout, scope)
        if residual is not None:
            residual = residual.to(x.dtype).contiguous()
        args = (*geometry, act, eps, schedule.save_policy(x.device.type), dtype, backend)
        return _PointwiseMLP.apply(
            x.contiguous(), w1, b1, gamma, beta, w2, b2, residual, drop_path_scale, offsets, args
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


def convnextv2_block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None = None,
    drop_path_scale: Tensor | None = None,
    scope: str = "image",
    act: str = "gelu",
    eps: float = 1e-6,
    grn_eps: float | None = None,
    save: str | None = None,
) -> Tensor:
    """The ConvNeXt V2 block ``x + drop_path_scale * MLP(LN(conv(x)))`` (paper Figure 5) as one autograd node.

    Args:
        x: packed ``[P, s, s, C]``, or dense ``[N, H, W, C]`` when ``layout`` is None.
        dw_weight: ``[C, 1, K, K]``, dw_bias: ``[C]`` or None; ln_weight, ln_bias: ``[C]``; the rest as in
            :func:`pointwise_mlp` with O = C. eps: of LayerNorm. grn_eps: of GRN, None for the same.
        save: what is kept for backward besides x and one norm per image and hidden channel, one of
            ``schedule.SAVE_POLICIES``: "inputs" nothing, "normalized" LayerNorm's rows, "hidden" those and the hidden
            activations; the less, the more runs again. None for what ``CONVNEXTV2_KERNELS_SAVE`` says, or the default
            of the device. The reference leaves it to autograd.

    Returns:
        The shape and dtype of x. Unless they are kept, hidden activations exist only for a chunk of images at a time.
    """
    check.check_packed(x, layout)
    check.check_depthwise_weight(dw_weight, dw_bias, x)
    check.check_param(ln_weight, "ln_weight", (x.shape[-1],), x)
    check.check_param(ln_bias, "ln_bias", (x.shape[-1],), x)
    _check_mlp(x, w1, b1, gamma, beta, w2, b2, x.shape[-1], layout, drop_path_scale, scope, act)
    check.check_eps(eps)
    name, grn_eps = ("eps", eps) if grn_eps is None else ("grn_eps", grn_eps)
    check.check_grn_eps(grn_eps, name)
    if save not in (None, *schedule.SAVE_POLICIES):
        raise ValueError(f"save must be one of {', '.join(schedule.SAVE_POLICIES)} or None, got {save!r}")
    dtype = product_dtype(x)
    backend = backends.select(x, "convnextv2_block", dtype)
    params = (dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, gamma, beta, w2, b2)
    with no_autocast(x):
        if backend == "reference":
            return ref.convnextv2_block(x, *params, layout, drop_path_scale, scope, act, eps, grn_eps, dtype)
        offsets, geometry = _geometry(x, layout, scope)
        neighbours = conv_neighbours(layout, dw_weight.shape[-1], x)
        args = (eps, *geometry, act, grn_eps, save or schedule.save_policy(x.device.type), dtype, backend)
        return _Block.apply(x.contiguous(), *params, neighbours, drop_path_scale, offsets, args)
