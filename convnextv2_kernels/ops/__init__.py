"""Public ops: functions of tensors with autograd, each checked, dispatched to a backend and documented with shapes."""

from .block import convnextv2_block
from .conv import depthwise_conv_layer_norm, submanifold_depthwise_conv2d
from .mlp import gathered_pointwise_mlp, pointwise_mlp
from .norm import gelu_grn, global_response_norm, layer_norm, layer_norm_grn
from .patches import gather_patches, scatter_patches
from .resample import downsample, linear, patch_embed, patch_embed_layer_norm

__all__ = [
    "convnextv2_block",
    "depthwise_conv_layer_norm",
    "downsample",
    "gather_patches",
    "gathered_pointwise_mlp",
    "gelu_grn",
    "global_response_norm",
    "layer_norm",
    "layer_norm_grn",
    "linear",
    "patch_embed",
    "patch_embed_layer_norm",
    "pointwise_mlp",
    "scatter_patches",
    "submanifold_depthwise_conv2d",
]
