"""The stem: pixels of the visible patches to features."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.reference import rows as ref
from ..layout import PatchLayout
from . import _checks as check
from ._autograd import once_differentiable
from .amp import no_autocast, product_dtype
from .rows import linear


class _PatchPixels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, patch_of_slot, slot_of_patch, gh, gw, backend):
        ctx.save_for_backward(slot_of_patch)
        ctx.args = (gh, gw, images.shape[1], images.shape[2], images.shape[3])
        ctx.backend = backend
        return backends.primitives(backend).patch_pixels(images, patch_of_slot, gh, gw)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slots,) = ctx.saved_tensors
        gh, gw, c, h, w = ctx.args
        k = backends.primitives(ctx.backend)
        grad = grad.contiguous()
        if slots is not None:
            grad = k.scatter_patches(grad, slots, gh, gw, None)
        rows = grad.reshape(-1, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5)
        return rows.reshape(-1, c, h, w), None, None, None, None, None


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, layout: PatchLayout | None = None
) -> Tensor:
    """The stem: 4x4 convolution of stride 4 over the visible patches as one matrix product.

    Args:
        images: NCHW ``[N, in, H, W]``; with a layout, H and W are the grid times a patch side that is a multiple of 4.
        weight: ``[C, in, 4, 4]``. bias: ``[C]`` or None.

    Returns:
        Packed ``[P, patch/4, patch/4, C]``, or ``[N, H/4, W/4, C]`` without a layout. Hidden pixels are not read.
    """
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
    elif h % 4 or w % 4:
        raise ValueError(f"images are {h}x{w} pixels, expected multiples of 4")
    if weight.dim() != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [C, {c}, 4, 4]")
    check.check_param(weight, "weight", (weight.shape[0], c, 4, 4), images)
    if bias is not None:
        check.check_param(bias, "bias", (weight.shape[0],), images)
    dtype = product_dtype(images)
    backend = backends.select(images, "patch_embed", dtype)
    if backend == "reference":
        with no_autocast(images):
            return ref.patch_embed(images, weight, bias, layout, dtype)
    if layout is None:
        args = (None, None, h // 4, w // 4)
    else:
        args = (layout.patch_of_slot, layout.slot_of_patch, *layout.grid)
    pixels = _PatchPixels.apply(images.contiguous(), *args, backend)
    return linear(pixels, weight.reshape(weight.shape[0], -1), bias)
