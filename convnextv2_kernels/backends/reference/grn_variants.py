"""GRN with another formula (ablations of ConvNeXt V2, Tables 2a-c and 16a-c), and the block around it or another layer.

Plain PyTorch. A map is packed ``[P, s, s, C]`` with a layout, or dense ``[N, H, W, C]`` without one; of a dense map
``visible [N, H, W, 1]`` (1 = visible, 0 = hidden) can hide sites, and the features at these are then zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dtypes import statistics_dtype
from ...layout import PatchLayout
from .conv import depthwise_conv2d
from .mlp import gelu_form
from .norm import image_sums, layer_norm, safe_sqrt, spread_over_rows
from .resample import linear

AGGREGATIONS = ("l2", "l1", "mean")
# dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, w2, b2
ParametersAround: TypeAlias = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
NORMALIZERS = ("divisive", "standardize", "inverse")


def aggregate(x: Tensor, layout: PatchLayout | None, scope: str, kind: str, visible: Tensor | None = None) -> Tensor:
    """``G(x) [N, C]`` over the visible sites of each image, or ``[1, C]`` over those of the batch (Table 2a).

    "l2" and "l1" are norms; "mean" is global average pooling and keeps its sign. x is zero where ``visible`` is. An
    image without visible sites has G = 0.
    """
    x = x.to(statistics_dtype(x.dtype))
    if kind == "l2":
        return safe_sqrt(image_sums(x.square(), layout, scope))
    if kind == "l1":
        return image_sums(x.abs(), layout, scope)
    ones = x.new_ones(*x.shape[:-1], 1) if visible is None else visible.to(x.dtype)
    return image_sums(x, layout, scope) / image_sums(ones, layout, scope).clamp(min=1)


def normalize(g: Tensor, kind: str, eps: float) -> Tensor:
    """``N(G)`` of ``G [N, C]`` over its channels: ``[N, C]``, or ``[N, 1]`` for "inverse" (Table 2b).

    The paper divides by sums over channels and scales by C (its footnote 1), which makes them means here. The deviation
    of "standardize" is the biased one; eps is added to the mean or to the deviation.
    """
    mean = g.mean(dim=-1, keepdim=True)
    if kind == "divisive":
        return g / (mean + eps)
    if kind == "inverse":
        return 1.0 / (mean + eps)
    centred = g - mean
    return centred / (safe_sqrt(centred.square().mean(dim=-1, keepdim=True)) + eps)


def global_response_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layout: PatchLayout | None,
    scope: str,
    eps: float,
    aggregation: str,
    normalizer: str,
    skip: bool,
    visible: Tensor | None = None,
) -> Tensor:
    """``x + gamma * (x * N(G(x))) + beta``, or ``gamma * (x * N(G(x))) + beta`` without ``skip`` (Table 2c).

    Without an aggregation ("none"), ``N(x)`` over the channels of each site in the place of ``N(G(x))``; without a
    normaliser ("none"), ``G(x)``; without both, 1 (Table 16a-c).

    Statistics and arithmetic are float32, float64 for float64 features; the result has the dtype of x. With
    ``visible``, x is zero at hidden sites, and what the result holds there means nothing.
    """
    stat = statistics_dtype(x.dtype)
    gamma = gamma.reshape(-1).to(stat)
    if aggregation == "none":
        scale = gamma if normalizer == "none" else gamma * normalize(x.to(stat), normalizer, eps)
        scale = 1.0 + scale if skip else scale
    else:
        g = aggregate(x, layout, scope, aggregation, visible)
        scale = gamma * (g if normalizer == "none" else normalize(g, normalizer, eps))
        scale = spread_over_rows(1.0 + scale if skip else scale, x, layout, scope)
    return (x * scale + beta.reshape(-1).to(stat)).to(x.dtype)


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
    aggregation: str,
    normalizer: str,
    skip: bool,
    visible: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """The block of :func:`.mlp.convnextv2_block` around any GRN, or none; on a dense map with ``visible``, the masked
    dense block."""
    params = (dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, w2, b2)
    settings = (act, eps, dtype)
    if gamma is None or beta is None:
        return block_around(_unchanged, x, params, layout, drop_path_scale, settings, visible, layer_scale)
    grn = partial(
        global_response_norm,
        gamma=gamma,
        beta=beta,
        layout=layout,
        scope=scope,
        eps=grn_eps,
        aggregation=aggregation,
        normalizer=normalizer,
        skip=skip,
        visible=visible,
    )
    return block_around(grn, x, params, layout, drop_path_scale, settings, visible, layer_scale)


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def block_around(
    hidden_layer: Callable[[Tensor], Tensor],
    x: Tensor,
    params: ParametersAround,
    layout: PatchLayout | None,
    drop_path_scale: Tensor | None,
    settings: tuple[str, float, torch.dtype],
    visible: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """The block around ``hidden_layer``, from the rows after GELU to rows of the same shape.

    ``settings``: act, eps of LayerNorm, and the dtype in which the GEMMs run. The mask comes after the convolution
    (paper A.2) and the block, and after GELU, where hidden sites would be in the layer's statistics: GELU(b1) is not 0.
    """
    dw_weight, dw_bias, ln_weight, ln_bias, w1, b1, w2, b2 = params
    act, eps, dtype = settings
    y = layer_norm(_masked(depthwise_conv2d(x, dw_weight, dw_bias, layout), visible), ln_weight, ln_bias, eps)
    a = F.linear(y.to(dtype), w1.to(dtype), b1.to(dtype))
    h = hidden_layer(_masked(F.gelu(a, approximate=gelu_form(act)), visible))
    y = linear(h, w2, b2, dtype).to(x.dtype)
    if layer_scale is not None:
        y = y * layer_scale.to(y.dtype)
    if drop_path_scale is not None:
        y = y * spread_over_rows(drop_path_scale.reshape(-1, 1).to(y.dtype), y, layout)
    return x + _masked(y, visible)


def _masked(x: Tensor, visible: Tensor | None) -> Tensor:
    return x if visible is None else x * visible.to(x.dtype)
