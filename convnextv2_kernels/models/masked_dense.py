"""The FCMAE encoder on dense maps that are multiplied by the mask, in plain PyTorch (ConvNeXt V2 paper, A.2).

It computes what the sparse encoder computes, hidden sites besides: the opponent of Figure 6, for
comparisons and as a check. Hidden pixels are zero from the start, so that not even a NaN among them gets through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dtypes import no_autocast, product_dtype
from ..layout import PatchLayout
from ..nn import PatchEmbed
from ..nn._checks import check_reference
from ._checks import check_images, check_layout
from .backbone import Backbone


def masked_dense_features(encoder: Backbone, images: Tensor, layout: PatchLayout) -> Tensor:
    """Features ``[N, H/32, W/32, dims[3]]`` of ``images [N, in_chans, H, W]``, zero where hidden.

    At visible sites they equal ``encoder(images, layout)``, for its GRN, scope, drop path and feature dtype.

    Raises:
        TypeError, ValueError: images of another shape or dtype; a layout of other images.
        RuntimeError: another backend than the reference is forced.
    """
    check_reference("the encoding 'masked_dense'")
    check_images(images, encoder.in_chans, 32)
    check_layout(layout, images)
    hidden = layout.hidden_mask()
    x = torch.where(_spread(hidden, images.shape[2]).unsqueeze(1), 0, images)
    x = x if encoder.feature_dtype is None else x.to(encoder.feature_dtype)
    for downsample, stage in zip(encoder.downsample_layers, encoder.stages, strict=True):
        x = _downsample(downsample, x)
        keep = (~_spread(hidden, x.shape[1])).to(x.dtype).unsqueeze(-1)
        x = x * keep
        for block in stage:
            x = block.forward_reference(x, keep=keep)
    return x


def _spread(hidden: Tensor, height: int) -> Tensor:
    """``hidden [N, Gh, Gw]`` -> ``[N, height, width]`` of the same proportions."""
    scale = height // hidden.shape[1]
    return hidden.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def _downsample(layer: nn.Module, x: Tensor) -> Tensor:
    """The stem, or one of the downsampling layers, on all sites."""
    dtype = product_dtype(x)
    with no_autocast(x):
        if isinstance(layer, PatchEmbed):
            conv, norm = layer
            y = norm.patch_embed(x, conv.weight, conv.bias, None, dtype)
            return norm.layer_norm(y, norm.weight, norm.bias, norm.eps)
        norm, conv = layer
        return norm.downsample(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.eps, dtype)
