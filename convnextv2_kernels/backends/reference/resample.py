"""Reference of the layers that change resolution, stem and downsampling, and of a linear layer, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import PatchLayout
from .norm import layer_norm
from .patches import gather_patches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x W' + b`` with operands in ``dtype`` and the result in x's."""
    bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


def patch_pixels(images: Tensor, layout: PatchLayout | None) -> Tensor:
    """NCHW images -> rows of 4x4 pixels in the order of a conv weight, ``[P, s, s, in*16]``; every one without a
    layout, ``[N, H/4, W/4, in*16]``."""
    n, c, h, w = images.shape
    rows = images.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 4, w // 4, c * 16)
    return rows if layout is None else gather_patches(rows, layout)


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, layout: PatchLayout | None, dtype: torch.dtype
) -> Tensor:
    """4x4 convolution of stride 4 as one GEMM over visible pixels only."""
    return linear(patch_pixels(images, layout), weight.reshape(weight.shape[0], -1), bias, dtype)


def downsample(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm, then the 2x2 convolution of stride 2, which never crosses a patch of even side."""
    y = layer_norm(x, ln_weight, ln_bias, eps).to(dtype).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(y, weight.to(dtype), bias, stride=2).permute(0, 2, 3, 1).to(x.dtype)
