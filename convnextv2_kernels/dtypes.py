"""Mixed precision in one table.

| tensor | dtype without autocast | under ``torch.autocast(dtype=T)`` |
|---|---|---|
| input and output of every op, residual stream | the input's | the input's |
| depthwise convolution, LayerNorm, GRN arithmetic | the input's, accumulated in float32 | the same |
| operands of matrix products (MLP, stem, downsampling) | the input's | T |
| hidden activations of the MLP | the input's | T |
| means, 1/std, GRN norms and every sum over rows | float32 (float64 for float64) | the same |
| parameter gradients | the parameter's | the parameter's |

float64 inputs are never lowered by autocast, as in PyTorch.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .backends.reference.norm import statistics_dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of matrix-product operands for input ``x`` under the current autocast state."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The ops place their casts themselves, so autocast is off inside them."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def stat_params(*params: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
    """Native kernels take parameters in the statistics dtype, contiguous."""
    dtype = statistics_dtype(like.dtype)
    return tuple(None if p is None else p.to(dtype).contiguous() for p in params)
