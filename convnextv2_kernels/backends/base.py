"""The MLP's products by the vendor's library (cuBLAS, rocBLAS) with passes over the hidden rows between them.

Shared by the GPU backends, each of which brings the passes: :class:`RowPasses`. The algebra is derived in
``docs/kernels/mlp.md``: beta never touches a hidden tensor, and where an image has many more rows than the block has
channels, GRN's scale goes into the second weight and its gradient comes from a product of its own.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference.norm import statistics_dtype

Statistics = tuple[Tensor, Tensor, Tensor]


class RowPasses(Protocol):
    """Passes over rows ``[M, H]`` in ``segments``; contracts in ``csrc/cuda/kernels.h``. ``act`` as in the schedule, or
    "none"."""

    def gelu_statistics(
        self, a: Tensor, h: Tensor | None, gamma: Tensor, eps: float, act: str, *segments
    ) -> tuple[Tensor, Tensor]: ...

    def gelu_scale(self, a: Tensor, out: Tensor, scale: Tensor | None, act: str, *segments) -> None: ...

    def mlp_backward_statistics(
        self,
        a: Tensor | None,
        ds: Tensor | None,
        t: Tensor | None,
        norm: Tensor,
        gamma: Tensor,
        eps: float,
        act: str,
        *segments,
    ) -> Statistics: ...

    def mlp_backward_pointwise(
        self, a: Tensor, ds: Tensor, scale: Tensor, kappa: Tensor, hs: Tensor | None, da: Tensor, act: str, *segments
    ) -> Tensor: ...

    def products_reduce(self, g: Tensor, weight: Tensor) -> Tensor: ...

    def products_weight(self, g: Tensor, scale: Tensor, d_sum: Tensor, beta: Tensor) -> Tensor: ...

    def scaled_weight_grad(
        self, a: Tensor, act: str, d: Tensor, d_sum: Tensor, scale: Tensor, beta: Tensor, *segments
    ) -> Tensor | None:
        """``d' (act(a) scale + beta)`` in one product, or None: leave it to the library."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight


def product(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product, batched or not, in the statistics dtype: the accumulators are not rounded to the operands'."""
    stat = statistics_dtype(x.dtype)
    if stat == x.dtype:
        return x @ y
    if x.is_cuda and torch.version.hip is None:  # ROCm's libraries refuse some of these
        return (torch.mm if x.dim() == 2 else torch.bmm)(x, y, out_dtype=stat)
    return x.to(stat) @ y.to(stat)


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    return product(grad.t(), x)


def _rows_per_image(a: Tensor, width: int, offsets: Tensor | None, _: int, count: int) -> int | None:
    """Rows of each image where a product per image pays: equal shares of more than twice the width; else None."""
    rows = a.shape[0] // count if count else 0
    return rows if offsets is None and rows > 2 * width else None


def gelu_grn_linear(
    passes: RowPasses,
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
    """Per image ``h (W2 scale)'`` where that pays; else a pass for the statistics, and one that forms ``h scale``."""
    out_c, hidden = weight.shape
    target = torch.empty_like(a) if keep_a else a
    rows = _rows_per_image(a, out_c, *segments)
    if rows is None:
        norm, scale = passes.gelu_statistics(a, None, gamma, eps, act, *segments)
        passes.gelu_scale(a, target, scale, act, *segments)
        y = F.linear(target, weight, bias)
    else:
        norm, scale = passes.gelu_statistics(a, target, gamma, eps, act, *segments)
        scaled = weight.new_empty(scale.shape[0], out_c, hidden, dtype=a.dtype)
        torch.mul(weight, scale.unsqueeze(1), out=scaled)  # rounded once, in one pass
        y = torch.baddbmm(bias, target.view(-1, rows, hidden), scaled.transpose(1, 2)).view(-1, out_c)
    return y if residual is None else residual + y, norm


def gelu_grn_linear_backward(
    passes: RowPasses,
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
    """Per image ``G = d' h`` where that pays, which gives t and the weight's gradient; else t is reduced from ds."""
    out_c, hidden = weight.shape
    rows = _rows_per_image(a, out_c, *segments)
    if rows is None:
        ds = d @ weight
        scale, kappa, dgamma = passes.mlp_backward_statistics(a, ds, None, norm, gamma, eps, act, *segments)
        dweight = passes.scaled_weight_grad(a, act, d, d_sum, scale, beta, *segments)
        hs = None if dweight is not None else torch.empty_like(a) if keep_a else a
        da_sum = passes.mlp_backward_pointwise(a, ds, scale, kappa, hs, ds, act, *segments)
        if hs is not None:
            dweight = torch.addr(linear_weight_grad(d, hs), d_sum, beta)
        return ds, da_sum, dgamma, dweight
    h = torch.empty_like(a)
    passes.gelu_scale(a, h, None, act, *segments)
    g = product(d.view(-1, rows, out_c).transpose(1, 2), h.view(-1, rows, hidden))
    del h
    t = passes.products_reduce(g, weight)
    scale, kappa, dgamma = passes.mlp_backward_statistics(None, None, t, norm, gamma, eps, act, *segments)
    dweight = passes.products_weight(g, scale, d_sum, beta)
    ds = d @ weight
    da_sum = passes.mlp_backward_pointwise(a, ds, scale, kappa, None, ds, act, *segments)
    return ds, da_sum, dgamma, dweight
