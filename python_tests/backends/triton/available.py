"""Whether Triton's kernels run here."""

from __future__ import annotations

import pytest
import torch

from convnextv2_kernels.backends import triton

needs_triton = pytest.mark.skipif(triton.load_error() is not None, reason=str(triton.load_error()))
_reason = triton.unsupported_reason(triton.DEVICE, torch.float32)
needs_kernels = pytest.mark.skipif(
    _reason is not None, reason=f"Triton's kernels do not run here (TRITON_INTERPRET=1 does without a GPU): {_reason}"
)
