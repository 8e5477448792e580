"""The primitives of the CPU backend: C++ operators and the vendor's matrix products.

Contracts: ``backends/reference/mlp.py`` for the MLP schedule, ``csrc/common/params.h`` for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _fakes
from ..cpu_gemm import linear, linear_input_grad, linear_weight_grad
from ..reference.mlp import fused_backward, fused_forward, prepare_parameters

__all__ = [  # beside what is defined below
    "fused_backward",
    "fused_forward",
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
    "prepare_parameters",
]

FOLDS_LAYER_NORM = False  # a pass over the weights costs more than it saves at a CPU's batch sizes (docs/kernels.md 3)

_ops = torch.ops.convnextv2_kernels

depthwise_conv_forward = _ops.depthwise_conv_forward.default
depthwise_conv_normalize = _ops.depthwise_conv_normalize.default
depthwise_conv_backward_weight = _ops.depthwise_conv_backward_weight.default
layer_norm_forward = _ops.layer_norm_forward.default
layer_norm_backward = _ops.layer_norm_backward.default
normalized_backward = _ops.normalized_backward.default
space_to_depth_normalize = _ops.space_to_depth_normalize.default
space_to_depth_normalize_backward = _ops.space_to_depth_normalize_backward.default
grn_forward = _ops.grn_forward.default
grn_backward = _ops.grn_backward.default
column_sum = _ops.column_sum.default
gather_patches = _ops.gather_patches.default
scatter_patches = _ops.scatter_patches.default
patch_pixels = _ops.patch_pixels.default

_fakes.register("convnextv2_kernels")


def gelu_grn_linear(
    a: Tensor,
    act: str,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    keep_a: bool,
    *segments,
) -> tuple[Tensor, Tensor]:
    """Turns a into act(a) in place, and applies GRN in place or through the weight."""
    h = torch.empty_like(a) if keep_a else a
    norm, scale = _ops.gelu_statistics.default(a, h, gamma, eps, act == "gelu_tanh", *segments)
    return _scaled_linear(h, weight, bias, scale, beta, residual, *segments), norm


def _scaled_linear(
    h: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, beta: Tensor, residual: Tensor | None, *segments
) -> Tensor:
    """Folds GRN into weight and bias where an image has more rows than the weight, else applies it to h, in place."""
    offsets, _, count = segments
    rows = h.shape[0] // count if count else 0
    if offsets is None and rows > 2 * weight.shape[0]:
        folded_bias = (bias + weight.to(beta.dtype) @ beta).to(h.dtype)
        adds = [None] * count if residual is None else residual.split(rows)
        parts = [
            linear(part, (weight * s).to(h.dtype), folded_bias, add)
            for part, s, add in zip(h.split(rows), scale, adds, strict=True)
        ]
        return parts[0] if count == 1 else torch.cat(parts)
    _ops.gelu_scale.default(h, h, scale, False, *segments, beta, False)  # h is activated already
    return linear(h, weight, bias, residual)


def gelu_grn_linear_backward(
    a: Tensor,
    act: str,
    d: Tensor,
    d_sum: Tensor,
    norm: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    weight: Tensor,
    keep_a: bool,
    *segments,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overwrites ds with da, and a with the GRN output, whose product with d is the weight's gradient."""
    tanh = act == "gelu_tanh"
    ds = linear_input_grad(d, weight)
    scale, kappa, dgamma = _ops.mlp_backward_statistics.default(a, ds, None, norm, gamma, eps, tanh, *segments)
    grn = torch.empty_like(a) if keep_a else a
    da_sum = _ops.mlp_backward_pointwise.default(a, ds, scale, kappa, grn, ds, tanh, *segments, beta)
    return ds, da_sum, dgamma, linear_weight_grad(d, grn)
