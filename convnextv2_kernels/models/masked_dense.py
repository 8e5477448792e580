"""The FCMAE encoder on dense maps that are multiplied by the mask, in plain PyTorch (ConvNeXt V2 paper, A.2).

It computes the features of the sparse encoder, and hidden sites as well: an ablation (Figure 6) and a check of the
sparse encoder. Hidden pixels are zeroed at the start, so that not even a NaN among them has an effect.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..layout import PatchLayout
from ..nn import Downsample, PatchEmbed
from ..ops._checks import check_images, check_layout_of_images
from ..ops._dispatch import require_reference
from .backbone import Backbone


def masked_dense_features(encoder: Backbone, images: Tensor, layout: PatchLayout) -> Tensor:
    """Features ``[N, H/32, W/32, dims[3]]`` of ``images [N, in_chans, H, W]``, zero where hidden.

    At visible sites they equal ``encoder(images, layout)``, for its GRN, scope, drop path and feature dtype.

    Raises:
        TypeError, ValueError: images of another shape or dtype; a layout of other images.
        RuntimeError: another backend than the reference is forced.
    """
    require_reference("the encoding 'masked_dense'")
    check_images(images, encoder.in_chans, 32)
    check_layout_of_images(layout, images)
    hidden = layout.hidden_mask()
    x = torch.where(_spread(hidden, images.shape[2]).unsqueeze(1), 0, images)
    x = x if encoder.feature_dtype is None else x.to(encoder.feature_dtype)
    for downsample, stage in zip(encoder.downsample_layers, encoder.stages, strict=True):
        x = cast("PatchEmbed | Downsample", downsample).forward_plain(x)
        visible = (~_spread(hidden, x.shape[1])).to(x.dtype).unsqueeze(-1)
        x = x * visible
        for block in cast("nn.Sequential", stage):
            x = block(x, visible=visible)
    return x


def _spread(hidden: Tensor, height: int) -> Tensor:
    """``hidden [N, Gh, Gw]`` -> ``[N, height, width]`` of the same proportions."""
    scale = height // hidden.shape[1]
    return hidden.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
