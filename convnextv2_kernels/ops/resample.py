"""The stem: pixels of the visible patches to features."""

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


class _Stem(torch.autograd.Function):
    """4x4/4 convolution of the visible patches, then LayerNorm unless ``ln_weight`` is None.

    Keeps only the images, which are alive anyway: the pixels of visible patches are gathered again in backward.
    """

    @staticmethod
    def forward(
        ctx, images, weight, bias, ln_weight, ln_bias, patch_of_slot, slot_of_patch, gh, gw, eps, dtype, backend
    ):
        k = backends.primitives(backend)
        ctx.save_for_backward(images, weight, bias, ln_weight, patch_of_slot, slot_of_patch)
        ctx.args, ctx.backend = (gh, gw, eps, dtype), backend
        ctx.ln_bias_dtype = None if ln_bias is None else ln_bias.dtype
        y = _convolve(k.patch_pixels(images, patch_of_slot, gh, gw), weight, bias, dtype, backend)
        if ln_weight is None:
            return y
        return k.layer_norm_forward(y, *stat_params(ln_weight, ln_bias, like=y), eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        images, weight, bias, ln_weight, patch_of_slot, slot_of_patch = ctx.saved_tensors
        gh, gw, eps, dtype = ctx.args
        k = backends.primitives(ctx.backend)
        pixels = k.patch_pixels(images, patch_of_slot, gh, gw)
        dy, dgain, dshift = grad.contiguous(), None, None
        if ln_weight is not None:
            y = _convolve(pixels, weight, bias, dtype, ctx.backend)
            z, _, rstd = k.layer_norm_forward(y, None, None, eps)
            dy, dgain, dshift = k.normalized_backward(dy, z, rstd, *stat_params(ln_weight, like=y))
            dgain, dshift = dgain.to(ln_weight.dtype), dshift.to(ctx.ln_bias_dtype)
        rows = dy.view(-1, dy.shape[-1])
        db = None if bias is None else k.column_sum(rows).to(bias.dtype)
        rows = rows.to(dtype)
        flat = pixels.view(-1, pixels.shape[-1]).to(dtype)
        dw = _operators.product_weight_grad(rows, flat, ctx.backend).to(weight.dtype).view(weight.shape)
        dimages = None
        if ctx.needs_input_grad[0]:
            dpixels = _operators.product_input_grad(rows, weight.flatten(1).to(dtype), ctx.backend)
            dpixels = dpixels.to(images.dtype).view(pixels.shape)
            if slot_of_patch is not None:
                dpixels = k.scatter_patches(dpixels, slot_of_patch, gh, gw, None)
            n, c, h, w = images.shape
            dimages = dpixels.view(n, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
        return dimages, dw, db, dgain, dshift, None, None, None, None, None, None, None


def _convolve(pixels: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    """Rows of pixels ``[..., in*16]`` -> features ``[..., C]`` of the pixels' dtype."""
    rows = pixels.view(-1, pixels.shape[-1]).to(dtype)
    b = None if bias is None else bias.to(dtype)
    y = _operators.product(rows, weight.flatten(1).to(dtype), b, backend)
    return y.to(pixels.dtype).view(*pixels.shape[:-1], weight.shape[0])


def _check_images(images: Tensor, weight: Tensor, bias: Tensor | None, layout: PatchLayout | None) -> None:
    check.check_float(images, "images")
    if images.dim() != 4:
        raise ValueError(f"images has shape {list(images.shape)}, expected [N, in_chans, H, W]")
    n, c, h, w = images.shape
    if layout is not None:
        check.check_layout(layout, images, "images")
        gh, gw = layout.grid
        if n != layout.num_images:
            raise ValueError(f"images holds {n} images, expected {layout.num_images}, the images of layout")
        if h % gh or w % gw or h // gh != w // gw or (h // gh) % 4 or h < gh:
            raise ValueError(
                f"images are {h}x{w} pixels, expected the layout's grid {gh}x{gw} times one patch side that is a "
                "multiple of 4"
            )
    elif min(h, w) < 4:
        raise ValueError(f"images are {h}x{w} pixels, expected sides of at least 4")
    if weight.dim() != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [C, {c}, 4, 4]")
    check.check_param(weight, "weight", (weight.shape[0], c, 4, 4), images)
    if bias is not None:
        check.check_param(bias, "bias", (weight.shape[0],), images)


def _whole_blocks(images: Tensor) -> Tensor:
    """Without the rows and columns that are left over of a side that is no multiple of 4, as PyTorch's convolution
    leaves them out; a copy where there are any."""
    return images[:, :, : images.shape[2] // 4 * 4, : images.shape[3] // 4 * 4].contiguous()


def _index(images: Tensor, layout: PatchLayout | None) -> tuple:
    """``(patch_of_slot, slot_of_patch, grid rows, grid columns)``; without a layout every 4x4 block is a patch."""
    if layout is None:
        return None, None, images.shape[2] // 4, images.shape[3] // 4
    return layout.patch_of_slot, layout.slot_of_patch, *layout.grid


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, layout: PatchLayout | None = None
) -> Tensor:
    """The stem: 4x4 convolution of stride 4 over the visible patches as one matrix product.

    Args:
        images: NCHW ``[N, in, H, W]``; with a layout, H and W are the grid times a patch side that is a multiple of 4,
            without one at least 4.
        weight: ``[C, in, 4, 4]``. bias: ``[C]`` or None.

    Returns:
        Packed ``[P, patch/4, patch/4, C]``, or ``[N, H//4, W//4, C]`` without a layout. Hidden pixels are not read.
    """
    _check_images(images, weight, bias, layout)
    images = _whole_blocks(images)
    dtype = product_dtype(images)
    backend = backends.select(images, "patch_embed", dtype)
    with no_autocast(images):
        if backend == "reference":
            return ref.patch_embed(images, weight, bias, layout, dtype)
        index = _index(images, layout)
        return _Stem.apply(images, weight, bias, None, None, *index, 0.0, dtype, backend)


def patch_embed_layer_norm(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    layout: PatchLayout | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm of :func:`patch_embed` as one autograd node that keeps nothing but the images.

    ``ln_weight``, ``ln_bias``: ``[C]``. Shapes, dtypes and errors as there.
    """
    _check_images(images, weight, bias, layout)
    check.check_param(ln_weight, "ln_weight", (weight.shape[0],), images)
    check.check_param(ln_bias, "ln_bias", (weight.shape[0],), images)
    check.check_eps(eps)
    images = _whole_blocks(images)
    dtype = product_dtype(images)
    backend = backends.select(images, "patch_embed_layer_norm", dtype)
    with no_autocast(images):
        if backend == "reference":
            y = ref.patch_embed(images, weight, bias, layout, dtype)
            return ref.layer_norm(y, ln_weight, ln_bias, eps)
        index = _index(images, layout)
        return _Stem.apply(images, weight, bias, ln_weight, ln_bias, *index, eps, dtype, backend)
