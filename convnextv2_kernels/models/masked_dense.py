"""The FCMAE encoder on dense maps, for comparison with the sparse one.

"masked_dense" multiplies every map by the mask, in plain PyTorch (ConvNeXt V2 paper, A.2): it computes the features of
the sparse encoder, and hidden sites as well (Figure 6). "dense" masks the image alone and runs ordinary convolutions,
into which hidden sites fill up (the paper's ablation "w/o sparse conv", section 3). Hidden pixels are zeroed at the
start, so that not even a NaN among them has an effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..layout import PatchLayout
from ..nn import Downsample, PatchEmbed
from ..ops._checks import check_images, check_layout_of_images
from ..ops._dispatch import require_reference
from .backbone import Backbone


def masked_dense_stages(encoder: Backbone, images: Tensor, layout: PatchLayout) -> Iterator[Tensor]:
    """Features ``[N, H/2^(i+2), W/2^(i+2), dims[i]]`` of each stage i of ``images [N, in_chans, H, W]``, zero where
    hidden.

    At visible sites they equal those of the sparse encoder, for its GRN, scope, drop path and feature dtype.

    Raises:
        TypeError, ValueError: images of another shape or dtype; a layout of other images.
        RuntimeError: another backend than the reference is forced.
    """
    require_reference("the encoding 'masked_dense'")
    hidden = layout.hidden_mask()
    x = _mask_images(encoder, images, layout)
    x = x if encoder.feature_dtype is None else x.to(encoder.feature_dtype)
    for downsample, stage in zip(encoder.downsample_layers, encoder.stages, strict=True):
        x = cast("PatchEmbed | Downsample", downsample).forward_plain(x)
        visible = (~_spread(hidden, x.shape[1])).to(x.dtype).unsqueeze(-1)
        x = x * visible
        for block in cast("nn.Sequential", stage):
            x = block(x, visible=visible)
        yield x


def masked_dense_features(encoder: Backbone, images: Tensor, layout: PatchLayout) -> Tensor:
    """The last features of :func:`masked_dense_stages`."""
    *_, x = masked_dense_stages(encoder, images, layout)
    return x


def dense_stages(encoder: Backbone, images: Tensor, layout: PatchLayout) -> Iterator[Tensor]:
    """Features of each stage as of :func:`masked_dense_stages`, but by convolutions and GRN over whole maps of images
    whose hidden pixels are zero, and by any backend. Not zero where hidden: features leak into hidden sites, and from
    there back.

    Raises:
        TypeError, ValueError: images of another shape or dtype; a layout of other images.
    """
    return encoder.stage_outputs(_mask_images(encoder, images, layout))


def _mask_images(encoder: Backbone, images: Tensor, layout: PatchLayout) -> Tensor:
    """Images with zeros in the place of hidden pixels."""
    check_images(images, encoder.in_chans, 32)
    check_layout_of_images(layout, images)
    return torch.where(_spread(layout.hidden_mask(), images.shape[2]).unsqueeze(1), 0, images)


def _spread(hidden: Tensor, height: int) -> Tensor:
    """``hidden [N, Gh, Gw]`` -> ``[N, height, width]`` of the same proportions."""
    scale = height // hidden.shape[1]
    return hidden.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
