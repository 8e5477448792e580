"""The dense classifier of ConvNeXt V2 and V1, and its stages as a backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn import GRNVariant, LayerNorm
from ..nn.init import init_linear_map
from ..ops._checks import check_positive
from ..sizes import CONFIGS
from .backbone import Backbone

_TINY = CONFIGS["convnextv2_tiny"]


class ConvNeXtV2(Backbone):
    """ConvNeXt V2 for classification (ConvNeXt V2 paper, section 4, A.1), with the official state_dict names.

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the head; with 0 the model has no head, and returns the head's
            input.
        depths, dims: blocks and width of each of the four stages.
        drop_path_rate: drop path of the last block; it grows linearly from 0 at the first.
        head_init_scale: factor on the initial weights of the head.
        feature_dtype: dtype of the feature maps, see :class:`.backbone.Backbone`; the head receives the
            dtype of the images.
        grn: GRN of every block, a :class:`~convnextv2_kernels.nn.GRNVariant` or its text; "none" leaves it out.
        layer_scale: initial layer scale of every block, or None for none; 1e-6 and ``grn="none"`` are ConvNeXt V1.

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
        grn: str | GRNVariant = "default",
        layer_scale: float | None = None,
    ):
        super().__init__(
            in_chans, depths, dims, drop_path_rate, feature_dtype=feature_dtype, grn=grn, layer_scale=layer_scale
        )
        self.num_classes = num_classes if num_classes == 0 else check_positive("num_classes", num_classes)
        self.norm = LayerNorm(dims[-1])
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = head = nn.Linear(dims[-1], num_classes)
            init_linear_map(head)
            with torch.no_grad():
                head.weight.mul_(head_init_scale)

    def forward_features(self, images: Tensor) -> Tensor:
        """``images [N, in_chans, H, W]``, sides of at least 32 -> ``[N, dims[3]]``: the last stage,
        averaged over its sites, then normalised."""
        features = self.run_stages(images).mean(dim=(1, 2))
        return self.norm(features if self.feature_dtype is None else features.to(images.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """``images [N, in_chans, H, W]``, sides of at least 32 -> logits ``[N, num_classes]``, or
        ``[N, dims[3]]`` without a head."""
        return self.head(self.forward_features(images))


class ConvNeXtV2Features(Backbone):
    """The feature maps of the stages, as a backbone for detection or segmentation.

    The state_dict is the classifier's without ``norm`` and ``head``. As in the official code, no norm
    follows a stage.

    Args:
        out_indices: the stages whose maps are returned, 0 to 3, ascending.
        The rest as :class:`ConvNeXtV2`.

    Attributes:
        channels, strides: of each returned map.
    """

    def __init__(
        self,
        in_chans: int = 3,
        depths: Sequence[int] = _TINY.depths,
        dims: Sequence[int] = _TINY.dims,
        drop_path_rate: float = 0.0,
        feature_dtype: torch.dtype | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        grn: str | GRNVariant = "default",
        layer_scale: float | None = None,
    ):
        super().__init__(
            in_chans, depths, dims, drop_path_rate, feature_dtype=feature_dtype, grn=grn, layer_scale=layer_scale
        )
        self.out_indices = tuple(out_indices)
        if not self.out_indices or self.out_indices != tuple(sorted(set(self.out_indices) & {0, 1, 2, 3})):
            raise ValueError(f"out_indices must be ascending stages from 0 to 3, got {tuple(out_indices)}")
        self.channels = tuple(dims[i] for i in self.out_indices)
        self.strides = tuple(4 << i for i in self.out_indices)

    def forward(self, images: Tensor) -> list[Tensor]:
        """``images [N, in_chans, H, W]``, sides of at least 32 -> maps ``[N, channels[i],
        H//strides[i], W//strides[i]]`` in channels-last strides."""
        stages = enumerate(self.stage_outputs(images))
        return [x.permute(0, 3, 1, 2) for i, x in stages if i in self.out_indices]
