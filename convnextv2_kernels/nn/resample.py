"""The layers that change resolution. Neither reads across the border of a patch."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .. import ops
from ..layout import PatchLayout
from ..ops._checks import check_positive
from ..ops.resample import plain_downsample, plain_stem
from .init import init_linear_map
from .layers import LayerNorm


class PatchEmbed(nn.Sequential):
    """Stem: 4x4 convolution of stride 4 (``.0``), then LayerNorm (``.1``), on the visible patches.

    ``0.weight [C, in_chans, 4, 4]``, ``0.bias``, ``1.weight``, ``1.bias [C]``; ``.0`` only holds
    parameters.

    Args:
        in_chans: channels of the images. dim: C.
    """

    def __init__(self, in_chans: int, dim: int):
        check_positive("in_chans", in_chans)
        check_positive("dim", dim)
        conv = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4)
        super().__init__(conv, LayerNorm(dim))
        init_linear_map(conv)

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """``images [N, in_chans, H, W]`` -> packed ``[P, s, s, C]`` with s = patch side / 4; dense
        ``[N, H//4, W//4, C]`` without a layout."""
        conv, norm = cast("tuple[nn.Conv2d, LayerNorm]", self)
        return ops.patch_embed_layer_norm(images, conv.weight, conv.bias, norm.weight, norm.bias, layout, eps=norm.eps)

    def forward_plain(self, images: Tensor) -> Tensor:
        """:meth:`forward` of whole images in plain PyTorch, whichever backend is forced."""
        conv, norm = cast("tuple[nn.Conv2d, LayerNorm]", self)
        return plain_stem(images, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)


class Downsample(nn.Sequential):
    """LayerNorm (``.0``), then a 2x2 convolution of stride 2 (``.1``).

    ``0.weight``, ``0.bias [dim_in]``, ``1.weight [dim_out, dim_in, 2, 2]``, ``1.bias [dim_out]``;
    both children only hold parameters.
    """

    def __init__(self, dim_in: int, dim_out: int):
        check_positive("dim_in", dim_in)
        check_positive("dim_out", dim_out)
        conv = nn.Conv2d(dim_in, dim_out, kernel_size=2, stride=2)
        super().__init__(LayerNorm(dim_in), conv)
        init_linear_map(conv)

    def forward(self, x: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """Packed ``[P, s, s, dim_in]`` -> ``[P, s/2, s/2, dim_out]``, or dense ``[N, H, W,
        dim_in]`` -> ``[N, H//2, W//2, dim_out]``; both are computed in the same way."""
        norm, conv = cast("tuple[LayerNorm, nn.Conv2d]", self)
        return ops.downsample(x, norm.weight, norm.bias, conv.weight, conv.bias, eps=norm.eps)

    def forward_plain(self, x: Tensor) -> Tensor:
        """:meth:`forward` in plain PyTorch, whichever backend is forced."""
        norm, conv = cast("tuple[LayerNorm, nn.Conv2d]", self)
        return plain_downsample(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.eps)
