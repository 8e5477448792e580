"""The dense ConvNeXt V2 classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn import LayerNorm
from ..nn._checks import check_positive
from ..nn.init import init_linear_map
from .config import CONFIGS
from .encoder import Backbone

_TINY = CONFIGS["convnextv2_tiny"]


class ConvNeXtV2(Backbone):
    """ConvNeXt V2 for classification (ConvNeXt V2 paper, section 3.2), with the official state_dict
    names.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the head.
        depths, dims: blocks and width of each of the four stages.
        drop_path_rate: drop path of the last block; it grows linearly from 0 at the first.
        head_init_scale: factor on the initial weights of the head.
        feature_dtype: dtype of the feature maps, see :class:`.encoder.Backbone`; the head sees the
            dtype of the images.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = _TINY.depths,
        dims: Sequence[int] = _TINY.dims,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        feature_dtype: torch.dtype | None = None,
    ):
        super().__init__(in_chans, depths, dims, drop_path_rate, feature_dtype=feature_dtype)
        self.num_classes = check_positive("num_classes", num_classes)
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        init_linear_map(self.head)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    def forward_features(self, images: Tensor) -> Tensor:
        """``images [N, in_chans, H, W]`` -> ``[N, dims[3]]``: the last stage, averaged over its
        sites, then normalised.

        Raises:
            ValueError: a side that is not a multiple of 32. (The official code drops what is left
            over of a
                side without saying so.)
        """
        features = self.run_stages(images).mean(dim=(1, 2))
        return self.norm(features if self.feature_dtype is None else features.to(images.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """``images [N, in_chans, H, W]``, H and W multiples of 32 -> logits ``[N,
        num_classes]``."""
        return self.head(self.forward_features(images))
