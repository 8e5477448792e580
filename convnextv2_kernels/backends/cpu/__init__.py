"""The CPU backend: C++ kernels from ``csrc/cpu``, matrix products by PyTorch's vendor libraries."""

from __future__ import annotations

import os

import torch

from .. import native as _extension

ISAS = ("avx512", "avx2", "baseline")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

_isa = os.environ.get("CONVNEXTV2_KERNELS_CPU_ISA", "")
if _isa not in ("", *ISAS):
    raise ValueError(f"CONVNEXTV2_KERNELS_CPU_ISA must be one of {', '.join(ISAS)}, got {_isa!r}")

extension = _extension.module
_load_error = _extension.load_error


def load_error() -> str | None:
    """Why the extension is not loaded, or None."""
    return _load_error


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Reason these kernels cannot serve the device and dtype, or None."""
    if _load_error is not None:
        return _load_error
    if device_type != "cpu":
        return f"its kernels serve tensors on cpu, and the input lies on {device_type}"
    if dtype not in DTYPES:
        return f"its kernels serve float32, float64 and bfloat16, and the input is {dtype}"
    return None


if extension is not None:
    from . import primitives  # noqa: F401  (registers the operators' fakes, so that they can be traced)
