"""Global response normalisation of rows ``[..., C]`` in segments, alone or after GELU.

Uses the passes of ``mlp_rows.py``. Bytes per 16-bit element: forward 2 for the squares and 4 for the result; backward 4
for the sums of both grad h (t) and grad (dbeta), and 6 for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...params import Segments
from .launch import operator
from .mlp_rows import gelu_statistics, gradient_rows, gradient_statistics, scale_rows
from .reduce import add_pair, partial_sums


@operator
def grn_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, offsets: Tensor | None, rows_per_slot: int, segments: int, gelu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``h * scale + beta`` like x, with ``h = gelu(x)`` or x, and norm ``A[segments, C]``."""
    act, own = "gelu" if gelu else "none", Segments(offsets, rows_per_slot, segments)
    norm, scale = gelu_statistics(x, None, gamma, eps, act, own)
    y = torch.empty_like(x)
    scale_rows(x, y, scale, beta, act, own)
    return y, norm


@operator
def grn_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, norm: Tensor, offsets: Tensor | None, rows_per_slot: int, segments: int,
    gelu: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx like x, dgamma and dbeta ``A[C]``."""
    act, own = "gelu" if gelu else "none", Segments(offsets, rows_per_slot, segments)
    sums = partial_sums(x, grad, None, act, False, True, own)
    scale, kappa, terms = gradient_statistics(sums.flatten(2), norm, gamma, eps, True)
    dx = torch.empty_like(x)
    gradient_rows(x, grad, (scale, kappa), None, dx, False, act, own)
    return dx, *add_pair(terms)
