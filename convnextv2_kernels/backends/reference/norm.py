"""Reference of LayerNorm and GRN on rows ``[..., C]``, in plain PyTorch: the specification of the fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dtypes import statistics_dtype
from ...layout import PatchLayout
from ...tracing import for_any_input


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension with biased variance."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    # a weight's size is a constant in a trace, where the size of packed rows is not
    return F.layer_norm(x, x.shape[-1:] if weight is None else weight.shape, weight, bias, eps)


def image_sums(x: Tensor, layout: PatchLayout | None, scope: str) -> Tensor:
    """Column sums ``[N, C]`` of the rows of each image, or ``[1, C]`` over the whole batch."""
    c = x.shape[-1]
    if scope == "batch":
        return x.reshape(-1, c).sum(0, keepdim=True)
    if layout is None:
        return x.flatten(1, -2).sum(1)
    per_slot = x.flatten(1, -2).sum(1)
    if for_any_input():  # the exporters to ONNX add no rows of the same index, or by int64 indices only
        patches = layout.grid[0] * layout.grid[1]
        rows = per_slot.new_zeros(layout.num_images * patches, c).index_copy(0, layout.patch_of_slot.long(), per_slot)
        return rows.view(layout.num_images, patches, c).sum(1)
    zero = per_slot.new_zeros(layout.num_images, c)
    return zero.index_add(0, layout.image_of_slot, per_slot)


def spread_over_rows(stat: Tensor, x: Tensor, layout: PatchLayout | None, scope: str = "image") -> Tensor:
    """``[N, C]``, or ``[1, C]`` of scope "batch", -> broadcastable against ``x [P or N, ..., C]``."""
    if scope == "image" and layout is not None:
        stat = stat.index_select(0, layout.image_of_slot)
    return stat.reshape(stat.shape[0], *(1,) * (x.dim() - 2), stat.shape[-1])


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0: a channel that is zero everywhere gets no gradient."""
    other = x != 0  # NaN too, which must not become 0
    return torch.where(other, torch.where(other, x, 1.0).sqrt(), 0.0)


def grn_scale(x: Tensor, gamma: Tensor, layout: PatchLayout | None, scope: str, eps: float) -> Tensor:
    """``1 + gamma * N(G(x))`` per image and channel (paper section 4, Algorithm 1), in the statistics dtype."""
    stat = statistics_dtype(x.dtype)
    norm = safe_sqrt(image_sums(x.to(stat).square(), layout, scope))
    response = norm / (norm.mean(dim=-1, keepdim=True) + eps)
    return 1.0 + gamma.reshape(-1).to(stat) * response


def global_response_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, layout: PatchLayout | None, scope: str, eps: float
) -> Tensor:
    """``x + gamma * (x * N(G(x))) + beta``; the norm runs over the visible pixels of an image (or of the batch)."""
    scale = spread_over_rows(grn_scale(x, gamma, layout, scope, eps), x, layout, scope)
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
