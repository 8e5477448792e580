"""The primitives of the Triton backend: Triton kernels, and products by the vendor's library where those are faster.

Contracts: ``backends/reference/mlp.py`` for the MLP schedule, ``csrc/common/params.h`` and
``csrc/cuda/kernels.h`` for the rest. Which products are fused: ``plans.py``.
"""

from __future__ import annotations

import functools

from torch import Tensor

from .. import base
from ..base import linear, linear_input_grad, linear_weight_grad
from . import mlp_rows, norm_grad, weights
from .conv import depthwise_conv_forward, depthwise_conv_normalize
from .conv_grad import depthwise_conv_backward_weight
from .fused import fused_backward, fused_forward, scaled_weight_grad
from .grn import grn_backward, grn_forward
from .norm import layer_norm_forward, space_to_depth_normalize
from .norm_grad import layer_norm_backward, space_to_depth_normalize_backward
from .patches import gather_patches, patch_pixels, scatter_patches
from .reduce import column_sum
from .weights import mlp_parameters, unfold_layer_norm

__all__ = [
    "column_sum", "depthwise_conv_backward_weight", "depthwise_conv_forward", "depthwise_conv_normalize",
    "fused_backward", "fused_forward", "gather_patches", "grn_backward", "grn_forward", "layer_norm_backward",
    "layer_norm_forward", "linear", "linear_input_grad", "linear_weight_grad", "patch_pixels", "scatter_patches",
    "space_to_depth_normalize", "space_to_depth_normalize_backward", "unfold_layer_norm",
]  # fmt: skip

FOLDS_LAYER_NORM = True


class Passes:
    """The row passes of :mod:`..library_products` in Triton."""

    gelu_statistics = staticmethod(mlp_rows.gelu_statistics)
    gelu_scale = staticmethod(mlp_rows.gelu_scale)
    mlp_backward_statistics = staticmethod(mlp_rows.mlp_backward_statistics)
    mlp_backward_pointwise = staticmethod(mlp_rows.mlp_backward_pointwise)
    products_reduce = staticmethod(weights.products_reduce)
    products_weight = staticmethod(weights.products_weight)
    scaled_weight_grad = staticmethod(scaled_weight_grad)


gelu_grn_linear = functools.partial(base.gelu_grn_linear, Passes)
gelu_grn_linear_backward = functools.partial(base.gelu_grn_linear_backward, Passes)


def prepare_parameters(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, beta: Tensor, layer_norm: tuple[Tensor, Tensor] | None,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """In one launch; ``W2 beta`` goes into the second bias."""
    return mlp_parameters(w1, b1, w2, b2, beta, layer_norm, like)


def normalized_backward(
    dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Without a weight (folded into the products) only the gradient of what was normalised."""
    if weight is None:
        return norm_grad.normalized_backward_input(dy, z, rstd), None, None
    return norm_grad.normalized_backward(dy, z, rstd, weight)
