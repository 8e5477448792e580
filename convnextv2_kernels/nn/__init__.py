"""Modules: they hold parameters under the official names and call :mod:`convnextv2_kernels.ops`.

Every forward takes ``(x, layout=None)``: packed visible patches with a layout, a dense map without
one.
"""

from ..ops._grn_variant import GRNVariant
from .block import ConvNeXtV2Block
from .hidden_layers import HiddenLayer, hidden_layer
from .layers import GlobalResponseNorm, LayerNorm, PointwiseMLP, SubmanifoldDepthwiseConv2d
from .resample import Downsample, PatchEmbed

__all__ = [
    "ConvNeXtV2Block",
    "Downsample",
    "GRNVariant",
    "GlobalResponseNorm",
    "HiddenLayer",
    "LayerNorm",
    "PatchEmbed",
    "PointwiseMLP",
    "SubmanifoldDepthwiseConv2d",
    "hidden_layer",
]
