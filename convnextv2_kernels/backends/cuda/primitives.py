"""The primitives of the CUDA backend: CUDA operators and cuBLAS.

Contracts: ``backends/reference/mlp.py`` for the MLP schedule, ``csrc/common/params.h`` and
``csrc/cuda/kernels.h`` for the rest. The MLP's algebra stands in ``backends/base.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _fakes, base
from ..base import linear, linear_input_grad, linear_weight_grad
from ..reference.mlp import fused_backward, fused_forward
from ..reference.norm import statistics_dtype
from . import EMULATED, NAMESPACE

__all__ = [  # beside what is defined below
    "fused_backward",
    "fused_forward",
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
]

_ops = getattr(torch.ops, NAMESPACE)
if EMULATED:
    _fakes.register(NAMESPACE)

# LayerNorm's affine part becomes part of the first product, so that its output is never formed
FOLDS_LAYER_NORM = True

depthwise_conv_forward = _ops.depthwise_conv_forward.default
depthwise_conv_normalize = _ops.depthwise_conv_normalize.default
depthwise_conv_backward_weight = _ops.depthwise_conv_backward_weight.default
layer_norm_forward = _ops.layer_norm_forward.default
layer_norm_backward = _ops.layer_norm_backward.default
space_to_depth_normalize = _ops.space_to_depth_normalize.default
space_to_depth_normalize_backward = _ops.space_to_depth_normalize_backward.default
grn_forward = _ops.grn_forward.default
grn_backward = _ops.grn_backward.default
column_sum = _ops.column_sum.default
gather_patches = _ops.gather_patches.default
scatter_patches = _ops.scatter_patches.default
patch_pixels = _ops.patch_pixels.default
layout_from_kept = _ops.layout_from_kept.default
neighbour_slots = _ops.neighbour_slots.default


def prepare_parameters(
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    beta: Tensor,
    layer_norm: tuple[Tensor, Tensor] | None,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """In one launch; ``W2 beta`` goes into the second bias."""
    stat = statistics_dtype(like.dtype)
    if not (w1.dtype == w2.dtype and w1.dtype in (like.dtype, stat)):
        w1, w2 = w1.to(stat), w2.to(stat)
    w1, w2 = w1.contiguous(), w2.contiguous()
    vectors = (None if t is None else t.to(stat).contiguous() for t in (b1, b2, beta, *(layer_norm or (None, None))))
    b1, b2, beta, gain, shift = vectors
    new_w1, b1, new_w2, new_b2 = _ops.mlp_parameters.default(w1, b1, w2, b2, beta, gain, shift, like)
    w1, w2 = (new if new.shape[0] else old for new, old in ((new_w1, w1), (new_w2, w2)))
    return w1, b1, w2, None if b2 is None else new_b2


def unfold_layer_norm(
    w1: Tensor, layer_norm: tuple[Tensor, Tensor], dw1: Tensor, db1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gain, shift = (t.to(dw1.dtype).contiguous() for t in layer_norm)
    if statistics_dtype(w1.dtype) != dw1.dtype:
        w1 = w1.to(dw1.dtype)
    dw1 = dw1.contiguous()
    dgain, dshift = _ops.unfold_layer_norm.default(w1.contiguous(), gain, shift, db1, dw1)
    return dw1, dgain, dshift


class Passes:
    """The row passes of :mod:`..library_products` by CUDA operators, which take GELU's form as a flag."""

    @staticmethod
    def gelu_statistics(a, h, gamma, eps, act, *segments):
        return _ops.gelu_statistics.default(a, h, gamma, eps, act == "gelu_tanh", *segments)

    @staticmethod
    def gelu_scale(a, out, scale, act, *segments):
        _ops.gelu_scale.default(a, out, scale, act == "gelu_tanh", *segments)

    @staticmethod
    def mlp_backward_statistics(a, ds, t, norm, gamma, eps, act, *segments):
        return _ops.mlp_backward_statistics.default(a, ds, t, norm, gamma, eps, act == "gelu_tanh", *segments)

    @staticmethod
    def mlp_backward_pointwise(a, ds, scale, kappa, hs, da, act, *segments):
        return _ops.mlp_backward_pointwise.default(a, ds, scale, kappa, hs, da, act == "gelu_tanh", *segments)

    products_reduce = staticmethod(_ops.products_reduce.default)
    products_weight = staticmethod(_ops.products_weight.default)

    @staticmethod
    def scaled_weight_grad(*_):
        return None


gelu_grn_linear = functools.partial(base.gelu_grn_linear, Passes)
gelu_grn_linear_backward = functools.partial(base.gelu_grn_linear_backward, Passes)


def normalized_backward(
    dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Without a weight (folded into the products) only the gradient of what was normalised."""
    if weight is None:
        return _ops.normalized_backward_input.default(dy, z, rstd), None, None
    return _ops.normalized_backward.default(dy, z, rstd, weight)
