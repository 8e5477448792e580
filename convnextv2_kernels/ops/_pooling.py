"""Statistics of an image's visible sites, for the layers that stand in GRN's place, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference.norm import image_sums, spread_over_rows
from ..backends.reference.patches import gather_patches, scatter_patches
from ..layout import PatchLayout

__all__ = ["gather_patches", "image_maxima", "image_means", "scatter_patches", "spread_over_rows"]


def image_means(x: Tensor, layout: PatchLayout | None, visible: Tensor | None = None) -> Tensor:
    """Mean ``[N, C]`` over the visible sites of each image, 0 where there are none.

    ``x`` packed ``[P, s, s, C]``, or dense ``[N, H, W, C]`` without a layout, then zero where ``visible [N, H, W, 1]``
    is, if given.
    """
    ones = x.new_ones(*x.shape[:-1], 1) if visible is None else visible.to(x.dtype)
    return image_sums(x, layout, "image") / image_sums(ones, layout, "image").clamp(min=1)


def image_maxima(x: Tensor, layout: PatchLayout | None, visible: Tensor | None = None) -> Tensor:
    """Largest value ``[N, C]`` over the visible sites of each image, 0 where there are none; arguments as of
    :func:`image_means`."""
    if layout is None:
        if visible is not None:
            x = torch.where(visible > 0, x, -torch.inf)
        largest = x.amax(dim=(1, 2))
        return torch.where(largest == -torch.inf, 0.0, largest)
    per_slot = x.amax(dim=(1, 2))
    images = layout.image_of_slot.long()[:, None].expand_as(per_slot)
    return per_slot.new_zeros(layout.num_images, x.shape[-1]).scatter_reduce(
        0, images, per_slot, "amax", include_self=False
    )
