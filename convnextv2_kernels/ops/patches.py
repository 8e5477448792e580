"""Gather and scatter between dense maps and packed patches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..dtypes import statistics_dtype
from ..layout import PatchLayout
from . import _checks as check
from ._dispatch import dispatch, once_differentiable


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, patch_of_slot, slot_of_patch, grid, backend):
        ctx.save_for_backward(slot_of_patch)
        ctx.grid, ctx.backend = grid, backend
        return backends.get(backend).gather_patches(x, patch_of_slot, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slots,) = ctx.saved_tensors
        dx = backends.get(ctx.backend).scatter_patches(grad.contiguous(), slots, ctx.grid, None)
        return dx, None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fill, patch_of_slot, slot_of_patch, grid, backend):
        ctx.save_for_backward(patch_of_slot, slot_of_patch)
        ctx.grid, ctx.backend = grid, backend
        ctx.fill_dtype = None if fill is None else fill.dtype
        if fill is not None:
            fill = fill.to(x.dtype).contiguous()
        return backends.get(backend).scatter_patches(x, slot_of_patch, grid, fill)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        patches, slots = ctx.saved_tensors
        grad = grad.contiguous()
        dx = backends.get(ctx.backend).gather_patches(grad, patches, ctx.grid)
        dfill = None
        if ctx.needs_input_grad[1]:
            gh, gw = ctx.grid
            n, h, w, c = grad.shape
            sites = grad.view(n, gh, h // gh, gw, w // gw, c)
            hidden = (slots < 0).view(n, gh, 1, gw, 1, 1)
            # selected, not multiplied: a NaN at a visible site stays there
            total = torch.where(hidden, sites, 0).sum((0, 1, 2, 3, 4), dtype=statistics_dtype(grad.dtype))
            dfill = total.to(ctx.fill_dtype)
        return dx, dfill, None, None, None, None


def gather_patches(x: Tensor, layout: PatchLayout) -> Tensor:
    """Pack the visible patches of a dense map.

    Args:
        x: ``[N, Gh*s, Gw*s, C]`` NHWC. layout: :class:`PatchLayout` of the same N images and grid.

    Returns:
        ``[P, s, s, C]`` of x's dtype. Hidden sites are not read.
    """
    check.check_dense(x, layout)
    return dispatch(
        "gather_patches",
        x,
        reference=lambda: reference.patches.gather_patches(x, layout),
        kernel=lambda backend: _Gather.apply(
            x.contiguous(), layout.patch_of_slot, layout.slot_of_patch, layout.grid, backend
        ),
    )


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
    return dispatch(
        "scatter_patches",
        x,
        reference=lambda: reference.patches.scatter_patches(x, layout, fill),
        kernel=lambda backend: _Scatter.apply(
            x.contiguous(), fill, layout.patch_of_slot, layout.slot_of_patch, layout.grid, backend
        ),
    )
