"""The primitives of the MLP schedule in plain PyTorch: their contract, for a new backend to keep.

A backend supplies beside them the convolution, the norms and the copies; their schemas stand in
``csrc/torch/schemas.cpp``, their contracts in the structs of ``csrc/common/params.h``. A backend with
``FOLDS_LAYER_NORM`` is given LN's affine part inside the first weight and bias.

Features are contiguous and of any float dtype T; parameters, statistics and parameter gradients are float32 (float64
for float64 features). ``segments`` is ``(offsets, rows_per_slot, count)``: rows fall into ``count`` equal segments
when ``offsets`` is None, else segment i holds rows ``rows_per_slot * (offsets[i] - offsets[0])`` up to the next.
A primitive may overwrite the arguments its docstring names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import gelu_form, statistics_dtype

FOLDS_LAYER_NORM = False


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


def prepare_parameters(
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    beta: Tensor,
    layer_norm: tuple[Tensor, Tensor] | None,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Weights and biases of the two products in T, the dtype of ``like``, as the other primitives take them.

    ``layer_norm = (weight, bias)`` is folded into the first, ``z W1f' + b1f = (z * weight + bias) W1' + b1``; only a
    backend with ``FOLDS_LAYER_NORM`` is given it. A backend may put beta ``[H]``, a statistic, into the second bias,
    which backward does without (None)."""
    if layer_norm is not None:
        gain, shift = (t.to(statistics_dtype(like.dtype)) for t in layer_norm)
        b1, w1 = b1 + w1.to(shift.dtype) @ shift, w1 * gain
    b2 = None if b2 is None else b2.to(like.dtype)
    return w1.to(like.dtype), b1.to(like.dtype), w2.to(like.dtype), b2


def unfold_layer_norm(
    w1: Tensor, layer_norm: tuple[Tensor, Tensor], dw1: Tensor, db1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1 and of LN's weight and bias from those of the folded weight and bias, all statistics; may
    overwrite dw1."""
    w1, gain, shift = (t.to(dw1.dtype) for t in (w1, *layer_norm))
    return dw1 * gain + torch.outer(db1, shift), (w1 * dw1).sum(0), db1 @ w1


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
    """``GRN(h) @ weight [O, H]' + bias [+ residual]`` of ``h = act(a) [M, H]``, and GRN's ``norm [count, H]``.

    ``act`` is "gelu" or "gelu_tanh", ``norm`` the root of the sum of ``h^2`` over the rows of a segment, and ``GRN(h) =
    h * scale + beta`` with ``scale = 1 + gamma * norm / (mean over H of norm + eps)``. a, weight and bias have T,
    gamma, beta ``[H]`` and norm are statistics; the result has T, or the residual's dtype. weight and bias are as
    prepared. Unless ``keep_a``, a may be overwritten."""
    owner = _segment_of_row(a, *segments)
    h = F.gelu(a, approximate=gelu_form(act))
    norm = _sums(h.to(gamma.dtype).square(), owner, segments[2]).sqrt()
    grn = h.to(gamma.dtype) * _grn_scale(norm, gamma, eps)[owner] + beta
    y = F.linear(grn.to(h.dtype), weight, bias)
    return y if residual is None else residual + y, norm


def _grn_scale(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return 1 + gamma * norm / (norm.mean(-1, keepdim=True) + eps)


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
    """From the gradient ``d [M, O]`` of the result and its column sums: ``da [M, H]``, its column sums ``[H]``, and
    the gradients of gamma ``[H]`` and weight ``[O, H]``; norm is what forward gave. Unless ``keep_a``, a may be
    overwritten.

    With ``ds = d @ weight``, and ``dnorm`` the gradient of norm, which depends on the column sums of ``ds * h`` of each
    segment: ``da = (ds * scale + h * kappa) * act'(a)``, ``kappa = dnorm / norm``, 0 where norm is 0."""
    stat = gamma.dtype
    owner, wide = _segment_of_row(a, *segments), a.to(stat)
    form = gelu_form(act)
    h, scale = F.gelu(wide, approximate=form), _grn_scale(norm, gamma, eps)
    ds = (d @ weight).to(stat)
    t = _sums(ds * h, owner, segments[2])
    mean = norm.mean(-1, keepdim=True) + eps
    dq = gamma * t
    dnorm = dq / mean - (dq * norm).sum(-1, keepdim=True) / (norm.shape[-1] * mean.square())
    kappa = torch.where(norm > 0, dnorm / torch.where(norm > 0, norm, 1.0), 0.0)
    da = torch.ops.aten.gelu_backward(ds * scale[owner] + h * kappa[owner], wide, approximate=form)
    dweight = d.to(stat).t() @ (h * scale[owner] + beta)
    return da.to(a.dtype), da.sum(0), (norm / mean * t).sum(0), dweight


def fused_forward(
    y: Tensor,
    w1: Tensor,
    b1: Tensor,
    act: str,
    gamma: Tensor,
    eps: float,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    factors: Tensor | None,
    out_dtype: torch.dtype,
    keep_a: bool,
    images: tuple,
    one_segment: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """``linear``, ``gelu_grn_linear``, the drop path ``factors [N]`` and the residual in one, by a backend that fuses
    its products; None where it does not, and then nothing has happened.

    Parameters are as prepared, with beta in the second bias. ``images`` is like ``segments``; with ``one_segment`` GRN
    takes them all as one. Returns the result ``[M, O]`` in ``out_dtype``, GRN's norm, and a or None."""
    return None


def fused_backward(
    a: Tensor,
    act: str,
    d: Tensor,
    d_sum: Tensor,
    norm: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    w1: Tensor,
    w2: Tensor,
    z: Tensor | None,
    rstd: Tensor | None,
    images: tuple,
    one_segment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """``gelu_grn_linear_backward``, ``linear_input_grad`` and, given z and rstd, ``normalized_backward`` without weight
    in one; None as above. a is not changed.

    Returns ``da [M, H]``, the gradient of the input (of what was normalised) ``[M, C]``, the column sums of da, and the
    gradients of gamma and w2."""
    return None


def normalized_backward(
    dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LayerNorm's backward from its normalised rows ``z = (x - mean) * rstd``, ``y = z * weight + bias``.

    dy, z ``[..., C]``, rstd ``[...]``, weight ``[C]`` -> gradients of x, weight, bias; None for the last two without a
    weight, which only a backend with ``FOLDS_LAYER_NORM`` is asked for."""
    stat = rstd.dtype
    g, n = dy.to(stat), z.to(stat)
    gw = g if weight is None else g * weight
    dx = rstd.unsqueeze(-1) * (gw - gw.mean(-1, keepdim=True) - n * (gw * n).mean(-1, keepdim=True))
    if weight is None:
        return dx.to(dy.dtype), None, None
    rows = tuple(range(dy.dim() - 1))
    return dx.to(dy.dtype), (g * n).sum(rows), g.sum(rows)
