"""Reference of the pointwise MLP and of the block, in plain PyTorch: the specification of the fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import PatchLayout
from .conv import depthwise_conv2d
from .norm import global_response_norm, layer_norm, spread_over_rows


def gelu_form(act: str) -> str:
    """PyTorch's name of the GELU that ``act`` names."""
    return {"gelu": "none", "gelu_tanh": "tanh"}[act]


def pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None,
    residual: Tensor | None,
    drop_path_scale: Tensor | None,
    scope: str,
    act: str,
    eps: float,
    dtype: torch.dtype,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """``residual + drop_path * layer_scale * (GRN(act(x W1' + b1)) W2' + b2)``; GEMMs in ``dtype``; no GRN without
    gamma and beta."""
    a = F.linear(x.to(dtype), w1.to(dtype), b1.to(dtype))
    h = F.gelu(a, approximate=gelu_form(act))
    if gamma is not None and beta is not None:
        h = global_response_norm(h, gamma, beta, layout, scope, eps)
    y = F.linear(h, w2.to(dtype), b2.to(dtype)).to(x.dtype)
    if layer_scale is not None:
        y = y * layer_scale.to(y.dtype)
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
    gamma: Tensor | None,
    beta: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    layout: PatchLayout | None,
    drop_path_scale: Tensor | None,
    scope: str,
    act: str,
    eps: float,
    grn_eps: float,
    dtype: torch.dtype,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """``x + drop_path * MLP(LN(conv(x)))`` (paper Figure 5)."""
    y = layer_norm(depthwise_conv2d(x, dw_weight, dw_bias, layout), ln_weight, ln_bias, eps)
    return pointwise_mlp(
        y, w1, b1, gamma, beta, w2, b2, layout, x, drop_path_scale, scope, act, grn_eps, dtype, layer_scale
    )
