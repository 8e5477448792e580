"""The whole ConvNeXt V2 block, one autograd node over the chunked schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .. import schedule
from ..backends import reference
from ..dtypes import cast, gemm_dtype
from ..layout import PatchLayout
from ..params import BlockBackwardArgs, BlockForwardArgs, Segments
from ..settings import SAVE_POLICIES
from . import _checks as check
from . import _operators
from ._dispatch import composite, dispatch, no_autocast, once_differentiable, require_reference
from ._grn_variant import GRNVariant
from .conv import depthwise_conv_layer_norm
from .mlp import as_kernels_take, check_mlp, pointwise_mlp, scale_branch

# dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, gamma, beta, w2, b2
BlockParameters: TypeAlias = tuple[
    Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor
]


class _Block(torch.autograd.Function):
    """Takes the fields of :class:`BlockForwardArgs`."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = composite(_operators.block_forward, schedule.run_block_forward, BlockForwardArgs._make(inputs))
        _Block.save(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def save(ctx, inputs, outputs):
        x, *params = inputs[:10]
        b2, *index = inputs[10:14]
        ctx.save_for_backward(x, *outputs[1:], *params, *index)
        ctx.settings, ctx.b2_dtype = inputs[14:], b2.dtype
        ctx.dw_bias_dtype = None if inputs[2] is None else inputs[2].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _Block.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        arguments = BlockBackwardArgs(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
        grads = composite(_operators.block_backward, schedule.run_block_backward, arguments)
        dx, ddw, ddb, *rest, db2 = grads
        ddb = None if ctx.dw_bias_dtype is None else cast(ddb, ctx.dw_bias_dtype)
        return dx, ddw, ddb, *rest, cast(db2, ctx.b2_dtype), *(None for _ in range(3 + len(ctx.settings)))


# For programs of torch.export, which hold the operator without the function around it.
_operators.differentiate("block_forward", _Block)


def _check(
    x: Tensor,
    params: BlockParameters,
    drop_path_scale: Tensor | None,
    layout: PatchLayout | None,
    settings: tuple[str, str, float, float | None, str | None],
    layer_scale: Tensor | None,
) -> None:
    dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, gamma, beta, w2, b2 = params
    scope, act, eps, grn_eps, save = settings
    check.check_packed(x, layout)
    check.check_depthwise_weight(dw_weight, dw_bias, x, "dw_")
    check.check_param(ln_weight, "ln_weight", (x.shape[-1],), x)
    check.check_param(ln_bias, "ln_bias", (x.shape[-1],), x)
    mlp = (w1, b1, gamma, beta, w2, b2)
    check_mlp(x, mlp, x.shape[-1], layout, drop_path_scale, (scope, act), layer_scale)
    check.check_eps(eps)
    check.check_grn_eps(*((eps, "eps") if grn_eps is None else (grn_eps, "grn_eps")))
    if save not in (None, *SAVE_POLICIES):
        raise ValueError(f"save must be one of {', '.join(SAVE_POLICIES)} or None, got {save!r}")


def convnextv2_block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None = None,
    drop_path_scale: Tensor | None = None,
    scope: str = "image",
    act: str = "gelu",
    eps: float = 1e-6,
    grn_eps: float | None = None,
    save: str | None = None,
    grn: str | GRNVariant = "default",
    visible: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """The ConvNeXt V2 block ``x + drop_path_scale * MLP(LN(conv(x)))`` (paper Figure 5) as one autograd node.

    With gamma and beta None and a ``layer_scale`` it is the block of ConvNeXt V1 (Liu et al. 2022, Figure 4).

    Args:
        x: packed ``[P, s, s, C]``, or dense ``[N, H, W, C]`` when ``layout`` is None.
        dw_weight: ``[C, 1, K, K]``, dw_bias: ``[C]`` or None; ln_weight, ln_bias: ``[C]``; the rest as in
            :func:`pointwise_mlp` with O = C. eps: of LayerNorm. grn_eps: of GRN, None for the same.
        save: what is saved for backward besides x and one norm per image and hidden channel: "inputs" nothing,
            "normalized" LayerNorm's rows, "hidden" those and the hidden activations; the less, the more runs again.
            None for the setting ``CONVNEXTV2_KERNELS_SAVE``, or the default of the device. The reference leaves it to
            autograd.
        grn: an ablation of GRN, :class:`~convnextv2_kernels.nn.GRNVariant` or its text. One without kernels runs in
            plain PyTorch; "none" ignores gamma and beta. Another layer in GRN's place has its own parameters: a module,
            :class:`~convnextv2_kernels.nn.ConvNeXtV2Block`, runs it.
        visible: ``[N, H, W, 1]``, 1 at visible and 0 at hidden sites of a dense map that is zero at hidden sites: the
            masked dense block, in plain PyTorch. The result is zero at hidden sites too.
        layer_scale: ``[C]``, multiplies the MLP's result, or None; gamma, beta: both None for no GRN; see
            :func:`pointwise_mlp`.

    Returns:
        The shape and dtype of x. Unless they are saved, hidden activations exist only for a chunk of images at a time.

    Raises:
        ValueError: ``grn`` is another layer than GRN.
        RuntimeError: a variant of GRN or a mask that only the reference has, and another backend is forced.
        ValueError: a variant of GRN without gamma and beta.
    """
    params = (dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, gamma, beta, w2, b2)
    tensors = (x, *params, drop_path_scale) if layer_scale is None else (x, *params, drop_path_scale, layer_scale)
    settings = (scope, act, eps, grn_eps, save)
    if not check.known(tensors, layout, settings):
        _check(x, params, drop_path_scale, layout, settings, layer_scale)
        check.remember(tensors, layout, settings)
    grn_eps = eps if grn_eps is None else grn_eps
    dtype = gemm_dtype(x)
    variant = GRNVariant.of(grn)
    if variant.layer != "grn":
        raise ValueError(f"grn must be a formula of GRN here, got {str(variant)!r}, a layer with parameters of its own")
    if gamma is None or beta is None:
        if variant.enabled and variant != GRNVariant():
            raise ValueError(f"gamma and beta must be tensors for the GRN variant '{variant}', got None")
    elif not variant.enabled:
        params = (*params[:6], *variant.affine(gamma, beta), w2, b2)
    if visible is not None:
        check.check_visible(visible, x, layout)
    if not variant.fused or visible is not None:
        what = "a masked dense block" if variant.fused else f"a block with the GRN variant '{variant}'"
        require_reference(f"{what} in plain PyTorch")
        with no_autocast(x):
            return reference.grn_variants.convnextv2_block(
                x,
                *params,
                layout,
                drop_path_scale,
                scope,
                act,
                eps,
                grn_eps,
                dtype,
                *variant.formula,
                visible,
                layer_scale,
            )
    if layer_scale is not None and dtype == torch.float16:
        y = depthwise_conv_layer_norm(x, dw_weight, dw_bias, ln_weight, ln_bias, layout, eps=eps)
        y = pointwise_mlp(y, *params[4:], layout, scope=scope, act=act, eps=grn_eps)
        return scale_branch(y, layer_scale, x, drop_path_scale, layout)

    def kernel(backend: str) -> Tensor:
        images = Segments.of(x, layout)
        plain = layer_scale is None and gamma is not None  # V2's block, whose host time is counted by the call
        return _Block.apply(
            x.contiguous(),
            *(params if plain else (*params[:4], *as_kernels_take(params[4:], layer_scale, x))),
            None if layout is None else layout.conv_neighbours(dw_weight.shape[-1], x.shape[1]),
            drop_path_scale,
            images.offsets,
            eps,
            images.rows_per_slot,
            images.count,
            scope == "batch",
            act,
            grn_eps,
            save or schedule.save_policy(x.device.type),
            dtype,
            backend,
        )

    return dispatch(
        "convnextv2_block",
        x,
        reference=lambda: reference.mlp.convnextv2_block(
            x, *params, layout, drop_path_scale, scope, act, eps, grn_eps, dtype, layer_scale
        ),
        kernel=kernel,
        gemm_dtype=dtype,
    )


def block_around(
    hidden_layer: Callable[[Tensor], Tensor],
    x: Tensor,
    params: reference.grn_variants.ParametersAround,
    layout: PatchLayout | None,
    drop_path_scale: Tensor | None,
    eps: float,
    visible: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """:func:`convnextv2_block` around any layer in GRN's place, in plain PyTorch.

    ``hidden_layer``: rows after GELU to rows of the same shape and dtype. ``params``: as there, without gamma and beta.
    """
    check.check_packed(x, layout)
    check.check_drop_path_scale(drop_path_scale, x.shape[0] if layout is None else layout.num_images, x)
    if visible is not None:
        check.check_visible(visible, x, layout)
    dtype = gemm_dtype(x)
    if layer_scale is not None:
        check.check_param(layer_scale, "layer_scale", (x.shape[-1],), x)
    with no_autocast(x):
        return reference.grn_variants.block_around(
            hidden_layer, x, params, layout, drop_path_scale, ("gelu", eps, dtype), visible, layer_scale
        )
