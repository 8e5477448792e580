"""Reference of the layers that act on rows ``[..., C]``, in plain PyTorch: the specification of the fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import PatchLayout
from .conv import depthwise_conv2d, patch_pixels


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are kept in float32, in float64 for float64 features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension with biased variance."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x W' + b`` with operands in ``dtype`` and the result in x's."""
    bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)


def image_sums(x: Tensor, layout: PatchLayout | None, scope: str) -> Tensor:
    """Column sums ``[N, C]`` of the rows of each image, or ``[1, C]`` over the whole batch."""
    c = x.shape[-1]
    if scope == "batch":
        return x.reshape(-1, c).sum(0, keepdim=True)
    if layout is None:
        return x.flatten(1, -2).sum(1)
    per_slot = x.flatten(1, -2).sum(1)
    zero = per_slot.new_zeros(layout.num_images, c)
    return zero.index_add(0, layout.image_of_slot, per_slot)


def spread_over_rows(stat: Tensor, x: Tensor, layout: PatchLayout | None) -> Tensor:
    """``[N, C]`` or ``[1, C]`` -> broadcastable against ``x [P or N, ..., C]``."""
    if stat.shape[0] != 1 and layout is not None:
        stat = stat.index_select(0, layout.image_of_slot)
    return stat.reshape(stat.shape[0], *(1,) * (x.dim() - 2), stat.shape[-1])


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0: a channel that is zero everywhere gets no gradient."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def grn_scale(x: Tensor, gamma: Tensor, layout: PatchLayout | None, scope: str, eps: float) -> Tensor:
    """``1 + gamma * N(G(x))`` per image and channel (paper section 3, Algorithm 1), in the statistics dtype."""
    stat = statistics_dtype(x.dtype)
    norm = safe_sqrt(image_sums(x.to(stat).square(), layout, scope))
    response = norm / (norm.mean(dim=-1, keepdim=True) + eps)
    return 1.0 + gamma.reshape(-1).to(stat) * response


def global_response_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, layout: PatchLayout | None, scope: str, eps: float
) -> Tensor:
    """``x + gamma * (x * N(G(x))) + beta``; the norm runs over the visible pixels of an image (or of the batch)."""
    scale = spread_over_rows(grn_scale(x, gamma, layout, scope, eps), x, layout)
    return (x * scale + beta.reshape(-1).to(scale.dtype)).to(x.dtype)


def gelu_grn(x: Tensor, gamma: Tensor, beta: Tensor, layout: PatchLayout | None, scope: str, eps: float) -> Tensor:
    """GRN(GELU(x)) with the exact (erf) GELU."""
    return global_response_norm(F.gelu(x), gamma, beta, layout, scope, eps)


def layer_norm_grn(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layout: PatchLayout | None,
    scope: str,
    ln_eps: float,
    eps: float,
) -> Tensor:
    """GRN(LN(x))."""
    return global_response_norm(layer_norm(x, ln_weight, ln_bias, ln_eps), gamma, beta, layout, scope, eps)


def gelu_form(act: str) -> str:
    """PyTorch's name of the GELU that ``act`` names."""
    return {"gelu": "none", "gelu_tanh": "tanh"}[act]


def pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None,
    residual: Tensor | None,
    drop_path_scale: Tensor | None,
    scope: str,
    act: str,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``residual + drop_path * (GRN(act(x W1' + b1)) W2' + b2)``; matrix products in ``dtype``."""
    a = F.linear(x.to(dtype), w1.to(dtype), b1.to(dtype))
    h = F.gelu(a, approximate=gelu_form(act))
    h = global_response_norm(h, gamma, beta, layout, scope, eps)
    y = F.linear(h, w2.to(dtype), b2.to(dtype)).to(x.dtype)
    if drop_path_scale is not None:
        y = y * spread_over_rows(drop_path_scale.reshape(-1, 1).to(y.dtype), y, layout)
    return y if residual is None else residual.to(x.dtype) + y


def convnextv2_block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None,
    drop_path_scale: Tensor | None,
    scope: str,
    act: str,
    eps: float,
    grn_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``x + drop_path * MLP(LN(conv(x)))`` (paper Figure 5)."""
    y = layer_norm(depthwise_conv2d(x, dw_weight, dw_bias, layout), ln_weight, ln_bias, eps)
    return pointwise_mlp(y, w1, b1, gamma, beta, w2, b2, layout, x, drop_path_scale, scope, act, grn_eps, dtype)


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, layout: PatchLayout | None, dtype: torch.dtype
) -> Tensor:
    """4x4 convolution of stride 4 as one matrix product over visible pixels only."""
    return linear(patch_pixels(images, layout), weight.reshape(weight.shape[0], -1), bias, dtype)


def downsample(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm, then the 2x2 convolution of stride 2, which never crosses a patch of even side."""
    y = layer_norm(x, ln_weight, ln_bias, eps).to(dtype).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(y, weight.to(dtype), bias, stride=2).permute(0, 2, 3, 1).to(x.dtype)
