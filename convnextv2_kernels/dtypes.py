"""Mixed precision in one table.

| tensor | dtype without autocast | under ``torch.autocast(dtype=T)`` |
|---|---|---|
| input and output of every op, residual stream | the input's | the input's |
| depthwise convolution, LayerNorm, GRN arithmetic | the input's, accumulated in float32 | the same |
| GEMM operands (MLP, stem, downsampling) | the input's | T |
| hidden activations of the MLP | the input's | T |
| means, 1/std, GRN norms and every sum over rows | float32 (float64 for float64) | the same |
| parameter gradients | the parameter's | the parameter's |

float64 inputs are never lowered by autocast, as in PyTorch.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, and float64 for float64 features."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def gemm_dtype(x: Tensor) -> torch.dtype:
    """Dtype of GEMM operands for input ``x`` under the current autocast state."""
    kind = x.device.type
    # asked of the device "meta", which has no autocast, PyTorch raises
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


@overload
def as_statistics(*params: Tensor, like: Tensor) -> tuple[Tensor, ...]: ...


@overload
def as_statistics(*params: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]: ...


def as_statistics(*params: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
    """Parameters as native kernels take them: contiguous, in the statistics dtype of ``like``."""
    dtype = statistics_dtype(like.dtype)
    return tuple(
        [p if p is None or (p.dtype is dtype and p.is_contiguous()) else p.to(dtype).contiguous() for p in params]
    )


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``; asking first is cheaper where nothing is to be done."""
    return t if t.dtype is dtype else t.to(dtype)
