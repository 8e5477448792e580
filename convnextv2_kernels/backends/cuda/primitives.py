"""The primitives of the CUDA backend: CUDA operators and cuBLAS.

Contracts: ``backends/reference/primitives.py`` for the MLP schedule, ``csrc/common/params.h`` and
``csrc/cuda/kernels.h`` for the rest. The algebra is derived in ``docs/kernels.md``: beta never touches a hidden
tensor, and where an image has many more rows than the block has channels, GRN's scale goes into the second weight and
its gradient comes from a product of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fakes
from ..reference.rows import statistics_dtype
from . import EMULATED, NAMESPACE

_ops = getattr(torch.ops, NAMESPACE)
if EMULATED:
    fakes.register(NAMESPACE)

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product, batched or not, in the statistics dtype: the accumulators are not rounded to the operands'."""
    stat = statistics_dtype(x.dtype)
    if stat == x.dtype:
        return x @ y
    if x.is_cuda:
        return (torch.mm if x.dim() == 2 else torch.bmm)(x, y, out_dtype=stat)
    return x.to(stat) @ y.to(stat)


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    return _product(grad.t(), x)


def prepare_parameters(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, beta: Tensor, layer_norm: tuple[Tensor, Tensor] | None,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
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


def _rows_per_image(a: Tensor, width: int, offsets: Tensor | None, _: int, count: int) -> int | None:
    """Rows of each image where a product per image pays: equal shares of more than twice the width; else None."""
    rows = a.shape[0] // count if count else 0
    return rows if offsets is None and rows > 2 * width else None


def gelu_grn_linear(
    a: Tensor, act: str, gamma: Tensor, beta: Tensor, eps: float, weight: Tensor, bias: Tensor,
    residual: Tensor | None, keep_a: bool, *segments,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per image ``h (W2 scale)'`` where that pays; else a pass for the statistics, and one that forms ``h scale``."""
    (out_c, hidden), tanh = weight.shape, act == "gelu_tanh"
    target = torch.empty_like(a) if keep_a else a
    rows = _rows_per_image(a, out_c, *segments)
    if rows is None:
        norm, scale = _ops.gelu_statistics.default(a, None, gamma, eps, tanh, *segments)
        _ops.gelu_scale.default(a, target, scale, tanh, *segments)
        y = F.linear(target, weight, bias)
    else:
        norm, scale = _ops.gelu_statistics.default(a, target, gamma, eps, tanh, *segments)
        scaled = weight.new_empty(scale.shape[0], out_c, hidden, dtype=a.dtype)
        torch.mul(weight, scale.unsqueeze(1), out=scaled)  # rounded once, in one pass
        y = torch.baddbmm(bias, target.view(-1, rows, hidden), scaled.transpose(1, 2)).view(-1, out_c)
    return y if residual is None else residual + y, norm


def gelu_grn_linear_backward(
    a: Tensor, act: str, d: Tensor, d_sum: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    weight: Tensor, keep_a: bool, *segments,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Per image ``G = d' h`` where that pays, which gives t and the weight's gradient; else t is reduced from ds."""
    (out_c, hidden), tanh = weight.shape, act == "gelu_tanh"
    rows = _rows_per_image(a, out_c, *segments)
    if rows is None:
        ds = d @ weight
        scale, kappa, dgamma = _ops.mlp_backward_statistics.default(a, ds, None, norm, gamma, eps, tanh, *segments)
        hs = torch.empty_like(a) if keep_a else a
        da_sum = _ops.mlp_backward_pointwise.default(a, ds, scale, kappa, hs, ds, tanh, *segments)
        return ds, da_sum, dgamma, torch.addr(linear_weight_grad(d, hs), d_sum, beta)
    h = torch.empty_like(a)
    _ops.gelu_scale.default(a, h, None, tanh, *segments)
    g = _product(d.view(-1, rows, out_c).transpose(1, 2), h.view(-1, rows, hidden))
    del h
    t = _ops.products_reduce.default(g, weight)
    scale, kappa, dgamma = _ops.mlp_backward_statistics.default(None, None, t, norm, gamma, eps, tanh, *segments)
    dweight = _ops.products_weight.default(g, scale, d_sum, beta)
    ds = d @ weight
    da_sum = _ops.mlp_backward_pointwise.default(a, ds, scale, kappa, None, ds, tanh, *segments)
    return ds, da_sum, dgamma, dweight


def normalized_backward(
    dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Without a weight (folded into the products) only the gradient of what was normalised."""
    if weight is None:
        return _ops.normalized_backward_input.default(dy, z, rstd), None, None
    return _ops.normalized_backward.default(dy, z, rstd, weight)
