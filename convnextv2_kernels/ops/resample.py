"""The layers that change resolution: the stem, from pixels of visible patches to features, and downsampling; and the
linear layer that both are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..dtypes import as_statistics, gemm_dtype
from ..layout import PatchLayout
from . import _checks as check
from . import _operators
from ._dispatch import dispatch, no_autocast, once_differentiable


class _Linear(torch.autograd.Function):
    """``x W' + b`` with operands in ``dtype``; the output has x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype, backend):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ctx.save_for_backward(rows, weight)
        ctx.backend, ctx.shape, ctx.dtype = backend, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        b = None if bias is None else bias.to(dtype)
        return _operators.linear(rows, weight.to(dtype), b, backend).to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        k = backends.get(ctx.backend)
        g = grad.reshape(-1, grad.shape[-1])
        db = None if ctx.bias_dtype is None else k.column_sum(g.contiguous()).to(ctx.bias_dtype)
        g = g.to(rows.dtype).contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _operators.linear_input_grad(g, weight.to(rows.dtype), ctx.backend).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = _operators.linear_weight_grad(g, rows, ctx.backend).to(weight.dtype)
        return dx, dw, db, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., C] @ weight [O, C]' + bias [O]`` by the backend's GEMM library; the dtype of x.

    Under autocast the operands are cast as the AMP table says (``dtypes.py``).
    """
    check.check_float(x, "x")
    check.check_float(weight, "weight")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [O, {x.shape[-1]}]")
    check.check_param(weight, "weight", (weight.shape[0], x.shape[-1]), x)
    if bias is not None:
        check.check_param(bias, "bias", (weight.shape[0],), x)
    dtype = gemm_dtype(x)
    return dispatch(
        "linear",
        x,
        reference=lambda: reference.resample.linear(x, weight, bias, dtype),
        kernel=lambda backend: _Linear.apply(x, weight, bias, dtype, backend),
        gemm_dtype=dtype,
    )


class _Downsample(torch.autograd.Function):
    """LayerNorm and 2x2/2 convolution as one GEMM; saves only x and normalises it again in backward."""

    @staticmethod
    def forward(ctx, x, ln_weight, ln_bias, weight, bias, eps, dtype, backend):
        k = backends.get(backend)
        lw, lb = as_statistics(ln_weight, ln_bias, like=x)
        y, _ = k.space_to_depth_normalize(x, lw, lb, eps)
        b = None if bias is None else bias.to(dtype)
        rows = y.view(-1, y.shape[-1]).to(dtype)
        out = _operators.linear(rows, _pixel_major(weight).to(dtype), b, backend)
        ctx.save_for_backward(x, ln_weight, ln_bias, weight)
        ctx.backend, ctx.eps, ctx.dtype = backend, eps, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(x.dtype).view(*y.shape[:3], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, ln_weight, ln_bias, weight = ctx.saved_tensors
        k = backends.get(ctx.backend)
        out_c, c = weight.shape[0], weight.shape[1]
        lw, lb = as_statistics(ln_weight, ln_bias, like=x)
        z, rstd = k.space_to_depth_normalize(x, None, None, ctx.eps)
        y = torch.addcmul(lb.to(x.dtype), z.view(-1, 4, c), lw.to(x.dtype)).view(-1, 4 * c)
        g = grad.reshape(-1, out_c).contiguous()
        db = None if ctx.bias_dtype is None else k.column_sum(g).to(ctx.bias_dtype)
        g = g.to(ctx.dtype)
        dy = _operators.linear_input_grad(g, _pixel_major(weight).to(ctx.dtype), ctx.backend)
        dx, dln_weight, dln_bias = k.space_to_depth_normalize_backward(dy.to(x.dtype).view(z.shape), z, rstd, lw)
        dw = _operators.linear_weight_grad(g, y.to(ctx.dtype), ctx.backend)
        dw = dw.view(out_c, 4, c).transpose(1, 2).reshape(weight.shape).to(weight.dtype)
        return dx, dln_weight.to(ln_weight.dtype), dln_bias.to(ln_bias.dtype), dw, db, None, None, None


def _pixel_major(weight: Tensor) -> Tensor:
    """2x2 kernel ``[O, C, 2, 2]`` -> matrix ``[O, 4*C]`` over (pixel, channel), the order of the normalised rows."""
    out_c, c = weight.shape[0], weight.shape[1]
    return weight.reshape(out_c, c, 4).transpose(1, 2).reshape(out_c, 4 * c)


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
    dtype = gemm_dtype(x)
    return dispatch(
        "downsample",
        x,
        reference=lambda: reference.resample.downsample(x, ln_weight, ln_bias, weight, bias, eps, dtype),
        kernel=lambda backend: _Downsample.apply(x.contiguous(), ln_weight, ln_bias, weight, bias, eps, dtype, backend),
        gemm_dtype=dtype,
    )


class _StemOptions(NamedTuple):
    """``eps``: of LayerNorm; ``dtype``: of the product's operands."""

    grid: tuple[int, int]
    eps: float
    dtype: torch.dtype
    backend: str


class _Stem(torch.autograd.Function):
    """4x4/4 convolution of the visible patches, then LayerNorm unless ``ln_weight`` is None.

    Keeps only the images, which are alive anyway: the pixels of visible patches are gathered again in backward.
    """

    @staticmethod
    def forward(ctx, images, weight, bias, ln_weight, ln_bias, patch_of_slot, slot_of_patch, options):
        grid, eps, dtype, backend = options
        k = backends.get(backend)
        ctx.save_for_backward(images, weight, bias, ln_weight, patch_of_slot, slot_of_patch)
        ctx.options = options
        ctx.ln_bias_dtype = None if ln_bias is None else ln_bias.dtype
        y = _convolve(k.patch_pixels(images, patch_of_slot, grid), weight, bias, dtype, backend)
        if ln_weight is None:
            return y
        lw, lb = as_statistics(ln_weight, ln_bias, like=y)
        return k.layer_norm_forward(y, lw, lb, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        images, weight, bias, ln_weight, patch_of_slot, slot_of_patch = ctx.saved_tensors
        grid, eps, dtype, backend = ctx.options
        k = backends.get(backend)
        pixels = k.patch_pixels(images, patch_of_slot, grid)
        dy, dln_weight, dln_bias = grad.contiguous(), None, None
        if ln_weight is not None:
            y = _convolve(pixels, weight, bias, dtype, backend)
            z, _, rstd = k.layer_norm_forward(y, None, None, eps)
            dy, dln_weight, dln_bias = k.normalized_backward(dy, z, rstd, *as_statistics(ln_weight, like=y))
            assert dln_weight is not None and dln_bias is not None
            dln_weight, dln_bias = dln_weight.to(ln_weight.dtype), dln_bias.to(ctx.ln_bias_dtype)
        rows = dy.view(-1, dy.shape[-1])
        db = None if bias is None else k.column_sum(rows).to(bias.dtype)
        rows = rows.to(dtype)
        flat = pixels.view(-1, pixels.shape[-1]).to(dtype)
        dw = _operators.linear_weight_grad(rows, flat, backend).to(weight.dtype).view(weight.shape)
        dimages = None
        if ctx.needs_input_grad[0]:
            dpixels = _operators.linear_input_grad(rows, weight.flatten(1).to(dtype), backend)
            dpixels = dpixels.to(images.dtype).view(pixels.shape)
            if slot_of_patch is not None:
                dpixels = k.scatter_patches(dpixels, slot_of_patch, grid, None)
            n, c, h, w = images.shape
            dimages = dpixels.view(n, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
        return dimages, dw, db, dln_weight, dln_bias, None, None, None


def _convolve(pixels: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    """Rows of pixels ``[..., in*16]`` -> features ``[..., C]`` of the pixels' dtype."""
    rows = pixels.view(-1, pixels.shape[-1]).to(dtype)
    b = None if bias is None else bias.to(dtype)
    y = _operators.linear(rows, weight.flatten(1).to(dtype), b, backend)
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
    check.check_float(weight, "weight")
    if weight.dim() != 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [C, {c}, 4, 4]")
    check.check_param(weight, "weight", (weight.shape[0], c, 4, 4), images)
    if bias is not None:
        check.check_param(bias, "bias", (weight.shape[0],), images)


def _whole_blocks(images: Tensor) -> Tensor:
    """Without the rows and columns that are left over of a side that is no multiple of 4, as PyTorch's convolution
    leaves them out; a copy where there are any."""
    return images[:, :, : images.shape[2] // 4 * 4, : images.shape[3] // 4 * 4].contiguous()


def _index(images: Tensor, layout: PatchLayout | None) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
    """``(patch_of_slot, slot_of_patch, grid)``; without a layout every 4x4 block is a patch."""
    if layout is None:
        return None, None, (images.shape[2] // 4, images.shape[3] // 4)
    return layout.patch_of_slot, layout.slot_of_patch, layout.grid


def _stem(
    images: Tensor,
    conv: tuple[Tensor, Tensor | None],
    layer_norm: tuple[Tensor | None, Tensor | None],
    layout: PatchLayout | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The stem by kernels; without LayerNorm if its weight is None."""
    patch_of_slot, slot_of_patch, grid = _index(images, layout)
    options = _StemOptions(grid, eps, dtype, backend)
    return _Stem.apply(images, *conv, *layer_norm, patch_of_slot, slot_of_patch, options)


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, layout: PatchLayout | None = None
) -> Tensor:
    """The stem: 4x4 convolution of stride 4 over the visible patches as one GEMM.

    Args:
        images: NCHW ``[N, in, H, W]``; with a layout, H and W are the grid times a patch side that is a multiple of 4,
            without one at least 4.
        weight: ``[C, in, 4, 4]``. bias: ``[C]`` or None.

    Returns:
        Packed ``[P, patch/4, patch/4, C]``, or ``[N, H//4, W//4, C]`` without a layout. Hidden pixels are not read.
    """
    _check_images(images, weight, bias, layout)
    images = _whole_blocks(images)
    dtype = gemm_dtype(images)
    return dispatch(
        "patch_embed",
        images,
        reference=lambda: reference.resample.patch_embed(images, weight, bias, layout, dtype),
        kernel=lambda backend: _stem(images, (weight, bias), (None, None), layout, 0.0, dtype, backend),
        gemm_dtype=dtype,
    )


def patch_embed_layer_norm(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    layout: PatchLayout | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm of :func:`patch_embed` as one autograd node that saves only the images.

    ``ln_weight``, ``ln_bias``: ``[C]``. Shapes, dtypes and errors as there.
    """
    _check_images(images, weight, bias, layout)
    check.check_param(ln_weight, "ln_weight", (weight.shape[0],), images)
    check.check_param(ln_bias, "ln_bias", (weight.shape[0],), images)
    check.check_eps(eps)
    images = _whole_blocks(images)
    dtype = gemm_dtype(images)
    return dispatch(
        "patch_embed_layer_norm",
        images,
        reference=lambda: reference.norm.layer_norm(
            reference.resample.patch_embed(images, weight, bias, layout, dtype), ln_weight, ln_bias, eps
        ),
        kernel=lambda backend: _stem(images, (weight, bias), (ln_weight, ln_bias), layout, eps, dtype, backend),
        gemm_dtype=dtype,
    )


def plain_stem(
    images: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, eps: float
) -> Tensor:
    """:func:`patch_embed_layer_norm` of whole images by the reference, whichever backend is forced."""
    dtype = gemm_dtype(images)
    with no_autocast(images):
        y = reference.resample.patch_embed(images, weight, bias, None, dtype)
        return reference.norm.layer_norm(y, ln_weight, ln_bias, eps)


def plain_downsample(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """:func:`downsample` by the reference, whichever backend is forced."""
    dtype = gemm_dtype(x)
    with no_autocast(x):
        return reference.resample.downsample(x, ln_weight, ln_bias, weight, bias, eps, dtype)
