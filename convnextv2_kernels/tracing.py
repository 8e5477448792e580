"""Whether PyTorch is recording what runs as a program, and which operators it may hold."""

from __future__ import annotations

import warnings

import torch

# What the checks of arguments compare is not part of a program of torch.jit.trace.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"convnextv2_kernels\.")


@torch.compiler.assume_constant_result  # Dynamo's own answer is False in an export that it captures
def exporting() -> bool:
    """Whether calls are recorded as PyTorch's own operators only: in ``torch.onnx.export`` (both exporters) and in
    ``torch.jit.trace``, whose programs run where this package is not installed."""
    # the ONNX exporters are one or the other, and to ask torch.onnx takes microseconds
    return torch._C._is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def for_any_input() -> bool:
    """Whether a program is being recorded that is to take other inputs too (``torch.export``, ``torch.onnx.export``,
    ``torch.jit.trace``), so that the values of a tensor decide nothing."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
