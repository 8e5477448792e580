"""Reference of the submanifold depthwise convolution, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...layout import PatchLayout
from .patches import gather_patches, scatter_patches


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, layout: PatchLayout | None) -> Tensor:
    """A submanifold convolution is the dense one on the zero-filled map, read at the visible sites."""
    dense = x if layout is None else scatter_patches(x, layout, None)
    c, k = weight.shape[0], weight.shape[-1]
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(dense.permute(0, 3, 1, 2), weight.to(x.dtype), bias, padding=k // 2, groups=c)
    y = y.permute(0, 2, 3, 1)
    return y if layout is None else gather_patches(y, layout)
