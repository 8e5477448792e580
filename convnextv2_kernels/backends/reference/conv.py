"""Reference of the layers that move between pixels, dense maps and packed patches, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...layout import PatchLayout


def gather_patches(x: Tensor, layout: PatchLayout) -> Tensor:
    """``[N, Gh*s, Gw*s, C]`` -> visible patches ``[P, s, s, C]``."""
    n, h, _w, c = x.shape
    gh, gw = layout.grid
    s = h // gh
    patches = x.reshape(n, gh, s, gw, s, c).permute(0, 1, 3, 2, 4, 5).reshape(n * gh * gw, s, s, c)
    return patches.index_select(0, layout.patch_of_slot)


def scatter_patches(x: Tensor, layout: PatchLayout, fill: Tensor | None) -> Tensor:
    """Packed ``[P, s, s, C]`` -> dense ``[N, Gh*s, Gw*s, C]``; hidden sites hold ``fill [C]`` or zero."""
    _, s, _, c = x.shape
    gh, gw = layout.grid
    total = layout.num_images * gh * gw
    dense = x.new_zeros(total, s, s, c) if fill is None else fill.to(x.dtype).reshape(1, 1, 1, c).expand(total, s, s, c)
    dense = dense.index_copy(0, layout.patch_of_slot.long(), x)
    grid = dense.reshape(layout.num_images, gh, gw, s, s, c).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(layout.num_images, gh * s, gw * s, c)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, layout: PatchLayout | None) -> Tensor:
    """A submanifold convolution is the dense one on the zero-filled map, read at the visible sites."""
    dense = x if layout is None else scatter_patches(x, layout, None)
    c, k = weight.shape[0], weight.shape[-1]
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(dense.permute(0, 3, 1, 2), weight.to(x.dtype), bias, padding=k // 2, groups=c)
    y = y.permute(0, 2, 3, 1)
    return y if layout is None else gather_patches(y, layout)


def patch_pixels(images: Tensor, layout: PatchLayout | None) -> Tensor:
    """NCHW images -> rows of 4x4 pixels in the order of a conv weight, ``[P, s, s, in*16]``; every one without a
    layout, ``[N, H/4, W/4, in*16]``."""
    n, c, h, w = images.shape
    rows = images.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 4, w // 4, c * 16)
    return rows if layout is None else gather_patches(rows, layout)
