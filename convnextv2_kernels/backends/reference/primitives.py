"""The primitives of the MLP schedule in plain PyTorch: their contract, for a new backend to keep.

A backend supplies beside them the convolution, the norms and the copies; their schemas stand in
``csrc/torch/schemas.cpp``, their contracts in the structs of ``csrc/cpu/kernels.h``.

Features are contiguous and of any float dtype T; parameters, statistics and parameter gradients are float32 (float64
for float64 features). ``segments`` is ``(offsets, rows_per_slot, count)``: rows fall into ``count`` equal segments
when ``offsets`` is None, else segment i holds rows ``rows_per_slot * (offsets[i] - offsets[0])`` up to the next.
A primitive may overwrite the arguments its docstring names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import statistics_dtype


def _segment_of_row(x: Tensor, offsets: Tensor | None, rows_per_slot: int, count: int) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if offsets is None:
        each = rows // max(count, 1)
        return torch.arange(count, device=x.device).repeat_interleave(each)
    return torch.arange(count, device=x.device).repeat_interleave(offsets.diff().long() * rows_per_slot)


def _sums(x: Tensor, owner: Tensor, count: int) -> Tensor:
    return x.new_zeros(count, x.shape[-1]).index_add(0, owner, x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [M, C] @ weight [H, C]' + bias [H]``, all of dtype T."""
    return F.linear(x, weight, bias)


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad [M, H] @ weight [H, C]``."""
    return grad @ weight


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """``grad [M, H]' @ x [M, C]`` in the statistics dtype."""
    stat = statistics_dtype(x.dtype)
    return grad.to(stat).t() @ x.to(stat)


def column_sum(x: Tensor) -> Tensor:
    """``[M, C] -> [C]`` in the statistics dtype."""
    return x.sum(0, dtype=statistics_dtype(x.dtype))


def gelu_square_sum(a: Tensor, *segments) -> tuple[Tensor, Tensor]:
    """``h = gelu(a) [M, H]`` and the column sums of ``h^2`` of each segment ``[count, H]``; may overwrite a."""
    h = F.gelu(a)
    square = h.to(statistics_dtype(a.dtype)).square()
    return h, _sums(square, _segment_of_row(a, *segments), segments[2])


def grn_scale(square_sum: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``norm = sqrt(square_sum)`` and ``scale = 1 + gamma * norm / (mean(norm) + eps)``, both ``[count, H]``."""
    norm = square_sum.sqrt()
    return norm, 1 + gamma * norm / (norm.mean(-1, keepdim=True) + eps)


def scaled_linear(
    h: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, beta: Tensor, residual: Tensor | None, *segments
) -> Tensor:
    """``(h * scale of the row's segment + beta) @ weight [C, H]' + bias [+ residual]``; may overwrite h.

    scale ``[count, H]`` and beta ``[H]`` are statistics; the result has T, or the residual's dtype."""
    grn = h.to(scale.dtype) * scale[_segment_of_row(h, *segments)] + beta
    y = F.linear(grn.to(h.dtype), weight, bias)
    return y if residual is None else residual + y


def mlp_backward_reduce(a: Tensor, ds: Tensor, *segments) -> Tensor:
    """``t = column sums of ds * gelu(a)`` of each segment, ``[count, H]``."""
    stat = statistics_dtype(a.dtype)
    return _sums(ds.to(stat) * F.gelu(a.to(stat)), _segment_of_row(a, *segments), segments[2])


def grn_gradient(t: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """From t: ``kappa [count, H]`` with ``dh = ds * scale + h * kappa``, and ``dgamma [H]``; kappa is 0 at norm 0."""
    mean = norm.mean(-1, keepdim=True) + eps
    dgamma = (norm / mean * t).sum(0)
    dq = gamma * t
    dnorm = dq / mean - (dq * norm).sum(-1, keepdim=True) / (norm.shape[-1] * mean.square())
    return torch.where(norm > 0, dnorm / torch.where(norm > 0, norm, 1.0), 0.0), dgamma


def mlp_backward_pointwise(
    a: Tensor, ds: Tensor, scale: Tensor, kappa: Tensor, beta: Tensor, *segments
) -> tuple[Tensor, Tensor, Tensor]:
    """``h * scale + beta``, ``da = (ds * scale + h * kappa) * gelu'(a)`` and ``db1 = column sums of da``; may overwrite
    a and ds."""
    stat = statistics_dtype(a.dtype)
    owner = _segment_of_row(a, *segments)
    wide = a.to(stat)
    h = F.gelu(wide)
    dh = ds.to(stat) * scale[owner] + h * kappa[owner]
    da = torch.ops.aten.gelu_backward(dh, wide)
    return (h * scale[owner] + beta).to(a.dtype), da.to(a.dtype), da.sum(0)


def normalized_backward(
    dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm's backward from its normalised rows ``z = (x - mean) * rstd``, ``y = z * weight + bias``.

    dy, z ``[..., C]``, rstd ``[...]``, weight ``[C]`` -> gradients of x, weight, bias."""
    stat = rstd.dtype
    g, n = dy.to(stat), z.to(stat)
    gw = g * weight
    dx = rstd.unsqueeze(-1) * (gw - gw.mean(-1, keepdim=True) - n * (gw * n).mean(-1, keepdim=True))
    rows = tuple(range(dy.dim() - 1))
    return dx.to(dy.dtype), (g * n).sum(rows), g.sum(rows)
