"""The four stages of ConvNeXt V2 or V1, on packed visible patches or on dense maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..layout import PatchLayout
from ..nn import ConvNeXtV2Block, Downsample, GRNVariant, PatchEmbed
from ..ops._checks import (
    check_drop_path_rate,
    check_images,
    check_layout_of_images,
    check_positive,
    check_scope,
    check_stages,
)


class Backbone(nn.Module):
    """Stem, three downsamplings and four stages of blocks, under the official names.

    ``downsample_layers.0`` is the stem, ``downsample_layers.1`` to ``.3`` halve the resolution
    before a stage; ``stages.i.j`` is block j of stage i. Drop path grows linearly over the blocks,
    from 0 to ``drop_path_rate``.

    ``feature_dtype`` is the dtype of the feature maps between layers; by default that of the
    images, hence float32 under autocast, where only GEMMs run in 16 bits. bfloat16 under
    autocast halves the bytes of every map, and rounds the residual stream at every block.

    ``grn`` is the GRN of every block, a :class:`~convnextv2_kernels.nn.GRNVariant` or its text; ``layer_scale`` the
    initial layer scale of every block, or None for none. ConvNeXt V1 is "none" and 1e-6.
    """

    def __init__(
        self,
        in_chans: int,
        depths: Sequence[int],
        dims: Sequence[int],
        drop_path_rate: float = 0.0,
        grn_scope: str = "image",
        feature_dtype: torch.dtype | None = None,
        grn: str | GRNVariant = "default",
        layer_scale: float | None = None,
    ):
        super().__init__()
        check_stages(depths, dims)
        if feature_dtype is not None and not feature_dtype.is_floating_point:
            raise ValueError(f"feature_dtype must be a floating-point dtype or None, got {feature_dtype}")
        self.feature_dtype = feature_dtype
        check_drop_path_rate(drop_path_rate, "drop_path_rate")
        check_scope(grn_scope, "grn_scope")
        self.grn = GRNVariant.of(grn)
        self.layer_scale = layer_scale
        self.in_chans = check_positive("in_chans", in_chans)
        self.depths = tuple(depths)
        self.dims = tuple(dims)
        self.downsample_layers = nn.ModuleList([PatchEmbed(in_chans, dims[0])])
        self.downsample_layers.extend(Downsample(dims[i], dims[i + 1]) for i in range(3))
        # On the CPU even if parameters are created on the meta device, which cannot be read back.
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvNeXtV2Block(dim, next(rates), grn_scope, self.grn, layer_scale) for _ in range(depth))
            for depth, dim in zip(depths, dims, strict=True)
        )

    def stage_outputs(self, images: Tensor, layout: PatchLayout | None = None) -> Iterator[Tensor]:
        """The features of the stages in order, of stride 4, 8, 16 and 32.

        Stage i of ``images [N, in_chans, H, W]``: packed ``[P, p/2^(i+2), p/2^(i+2), dims[i]]`` for
        patches of p pixels, or dense ``[N, H/2^(i+2), W/2^(i+2), dims[i]]`` without a layout, sides
        rounded down as by PyTorch's convolutions.

        Raises:
            TypeError, ValueError: images of another shape or dtype; without a layout, a side of
                less than 32; a layout of other images, or sides that are not multiples
                of 32 with one.
        """
        check_images(images, self.in_chans, 32, any_size=layout is None)
        if layout is not None:
            check_layout_of_images(layout, images)
        x = images if self.feature_dtype is None else images.to(self.feature_dtype)
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x, layout)
            for block in cast("nn.ModuleList", stage):
                x = block(x, layout)
            yield x

    def run_stages(self, images: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """The last features of :meth:`stage_outputs`."""
        *_, x = self.stage_outputs(images, layout)
        return x


class SparseEncoder(Backbone):
    """The FCMAE encoder: it computes visible patches only, and hidden pixels affect none of its
    features.

    Args:
        in_chans: channels of the images.
        depths, dims: blocks and width of each of the four stages.
        drop_path_rate: drop path of the last block.
        grn_scope: see :class:`convnextv2_kernels.nn.GlobalResponseNorm`.
        feature_dtype, grn, layer_scale: see :class:`Backbone`.
    """

    def forward(self, images: Tensor, layout: PatchLayout | Tensor | None = None) -> Tensor:
        """``images [N, in_chans, H, W]`` -> packed ``[P, p/32, p/32, dims[3]]`` for patches of p
        pixels (p any multiple of 32), or dense ``[N, H//32, W//32, dims[3]]`` without a layout.

        ``layout`` may be a mask ``[N, Gh, Gw]`` bool, True = hidden, as an exported program takes it; see
        :meth:`.PatchLayout.from_mask`.
        """
        return self.run_stages(images, PatchLayout.from_mask(layout) if isinstance(layout, Tensor) else layout)
