"""Whether PyTorch is recording what runs, and in which form."""

from __future__ import annotations

import sys
import warnings

import torch

# What the checks of arguments compare is not part of a program of torch.jit.trace.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"convnextv2_kernels\.")


def exporting() -> bool:
    """Whether calls are recorded as PyTorch's own operators only: in ``torch.onnx.export`` (both exporters) and in
    ``torch.jit.trace``, whose programs run where this package is not installed."""
    if torch.compiler.is_dynamo_compiling():
        return False
    # torch.onnx is imported when it is first used, which takes a second
    return torch.jit.is_tracing() or ("torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export())
