"""The primitives of the CPU backend: C++ operators, their fakes, and the vendor's matrix products.

Contracts: ``backends/reference/primitives.py`` for the MLP schedule, ``csrc/cpu/kernels.h`` for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.rows import statistics_dtype
from .products import linear, linear_input_grad, linear_weight_grad

__all__ = ["linear", "linear_input_grad", "linear_weight_grad"]  # beside what is defined below

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
grn_scale = _ops.grn_scale.default
grn_gradient = _ops.grn_gradient.default
mlp_backward_reduce = _ops.mlp_backward_reduce.default
column_sum = _ops.column_sum.default
gather_patches = _ops.gather_patches.default
scatter_patches = _ops.scatter_patches.default
patch_pixels = _ops.patch_pixels.default


def gelu_square_sum(a: Tensor, *segments) -> tuple[Tensor, Tensor]:
    """Overwrites a with gelu(a)."""
    return a, _ops.gelu_square_sum_.default(a, *segments)


def scaled_linear(
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
    _ops.scale_rows_.default(h, scale, beta, *segments)
    return linear(h, weight, bias, residual)


def mlp_backward_pointwise(
    a: Tensor, ds: Tensor, scale: Tensor, kappa: Tensor, beta: Tensor, *segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites a with ``h * scale + beta`` and ds with ``da``."""
    return a, ds, _ops.mlp_backward_pointwise_.default(a, ds, scale, kappa, beta, *segments)


def _stat(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=statistics_dtype(like.dtype))


def _fake(name: str):
    return torch.library.register_fake(f"convnextv2_kernels::{name}")


@_fake("depthwise_conv_forward")
def _(x, weight, bias, residual, neighbours, flip):
    return x.new_empty(x.shape)


@_fake("depthwise_conv_normalize")
def _(x, weight, bias, neighbours, ln_weight, ln_bias, eps):
    return x.new_empty(x.shape), _stat(x, *x.shape[:-1])


@_fake("depthwise_conv_backward_weight")
def _(grad, x, neighbours, kernel_size):
    return _stat(x, x.shape[-1], 1, kernel_size, kernel_size), _stat(x, x.shape[-1])


@_fake("layer_norm_forward")
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), _stat(x, *x.shape[:-1]), _stat(x, *x.shape[:-1])


@_fake("layer_norm_backward")
def _(grad, x, mean, rstd, weight):
    return x.new_empty(x.shape), _stat(x, x.shape[-1]), _stat(x, x.shape[-1])


@_fake("normalized_backward")
def _(dy, z, rstd, weight):
    return z.new_empty(z.shape), _stat(z, z.shape[-1]), _stat(z, z.shape[-1])


@_fake("space_to_depth_normalize")
def _(x, weight, bias, eps):
    maps, h, w, c = x.shape
    return x.new_empty(maps, h // 2, w // 2, 4 * c), _stat(x, maps, h, w)


@_fake("space_to_depth_normalize_backward")
def _(dy, z, rstd, weight):
    c = z.shape[-1] // 4
    return z.new_empty(*rstd.shape, c), _stat(z, c), _stat(z, c)


@_fake("grn_forward")
def _(x, gamma, beta, offsets, rows_per_slot, segments, gelu, eps):
    return x.new_empty(x.shape), _stat(x, segments, x.shape[-1])


@_fake("grn_backward")
def _(grad, x, gamma, norm, offsets, rows_per_slot, segments, gelu, eps):
    return x.new_empty(x.shape), _stat(x, x.shape[-1]), _stat(x, x.shape[-1])


@_fake("gelu_square_sum_")
def _(a, offsets, rows_per_slot, segments):
    return _stat(a, segments, a.shape[-1])


@_fake("scale_rows_")
def _(h, scale, beta, offsets, rows_per_slot, segments):
    return None


@_fake("mlp_backward_reduce")
def _(a, ds, offsets, rows_per_slot, segments):
    return _stat(a, segments, a.shape[-1])


@_fake("mlp_backward_pointwise_")
def _(a, ds, scale, kappa, beta, offsets, rows_per_slot, segments):
    return _stat(a, a.shape[-1])


@_fake("grn_scale")
def _(square_sum, gamma, eps):
    return square_sum.new_empty(square_sum.shape), square_sum.new_empty(square_sum.shape)


@_fake("grn_gradient")
def _(t, norm, gamma, eps):
    return t.new_empty(t.shape), t.new_empty(t.shape[-1])


@_fake("column_sum")
def _(x):
    return _stat(x, x.shape[-1])


@_fake("transpose_rows")
def _(x):
    return x.new_empty(x.shape[1], x.shape[0])


@_fake("gather_patches")
def _(x, patch_of_slot, grid_h, grid_w):
    side = x.shape[1] // grid_h
    return x.new_empty(patch_of_slot.shape[0], side, side, x.shape[-1])


@_fake("scatter_patches")
def _(x, slot_of_patch, grid_h, grid_w, fill):
    return x.new_empty(slot_of_patch.shape[0], grid_h * x.shape[1], grid_w * x.shape[1], x.shape[-1])


@_fake("patch_pixels")
def _(images, patch_of_slot, grid_h, grid_w):
    n, c, h, w = images.shape
    if patch_of_slot is None:
        return images.new_empty(n, grid_h, grid_w, c * 16)
    side = h // (4 * grid_h)
    return images.new_empty(patch_of_slot.shape[0], side, side, c * 16)
