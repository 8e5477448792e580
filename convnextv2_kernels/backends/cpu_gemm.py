"""GEMMs of the CPU backend, by the vendor library that is faster for the case.

PyTorch's ``mm`` calls MKL, whose AVX-512 kernels do not run on processors of other makers; oneDNN's do. Through
``F.linear``'s oneDNN form a float32 GEMM runs about twice as fast there. On Intel's processors MKL is mostly the
faster one for the GEMMs of backward; in forward oneDNN adds bias and residual in the same pass. (Measured:
``docs/kernels/mlp.md``.) float64 has no oneDNN kernels and bfloat16 reaches them through ``mm`` by itself.
``CONVNEXTV2_KERNELS_CPU_GEMM`` = ``onednn`` or ``mm`` forces the choice for float32.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import cast, statistics_dtype
from ..settings import current


def _onednn_linear():
    """The operator Inductor uses for oneDNN linear layers, if this PyTorch has it and it computes what it should."""
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        x = torch.arange(6.0).view(2, 3)
        w = torch.arange(12.0).view(3, 4).t()
        if torch.equal(op(x, w, None, "none", [], ""), x @ w.t()):
            return op
    except (AttributeError, RuntimeError):
        pass
    return None


def _intel_with_mkl() -> bool:
    """Whether ``mm`` is MKL on a processor it is written for."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


def _choose() -> tuple:
    """oneDNN's operator, or None to use ``mm``: for the GEMMs of forward, and for the GEMMs of backward."""
    requested = current.cpu_gemm
    if requested == "mm" or not torch.backends.mkldnn.is_available():
        return None, None
    op = _onednn_linear()
    if op is None and requested == "onednn":
        raise RuntimeError("CONVNEXTV2_KERNELS_CPU_GEMM=onednn, but this PyTorch has no oneDNN linear operator")
    return op, None if requested == "auto" and _intel_with_mkl() else op


_onednn, _onednn_backward = _choose()
_onednn_add: Any = None if _onednn is None else torch.ops.mkldnn._linear_pointwise.binary


def vendor() -> str:
    """Which library multiplies float32 matrices."""
    forward, backward = ("mm (MKL or BLAS)" if op is None else "oneDNN" for op in (_onednn, _onednn_backward))
    return forward if forward == backward else f"{forward}, in backward {backward}"


# Multiply-adds below which a call of oneDNN costs more than the GEMM itself. On an AMD processor the two were equally
# fast at about a million; the bound is lower, as above it results keep the bits that oneDNN gives them.
_SMALL = 0 if current.cpu_gemm == "onednn" else 1 << 16


def _runs(onednn, x: Tensor, columns: int) -> bool:
    """Whether oneDNN multiplies ``x [M, K]`` by a matrix of so many columns."""
    return onednn is not None and x.dtype is torch.float32 and x.numel() * columns > _SMALL


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """``x [M, C] @ weight [H, C]' + bias [H] [+ residual [M, H]]``; strides of x and weight are free."""
    if not _runs(_onednn, x, weight.shape[0]):
        y = F.linear(x, weight, bias)
        return y if residual is None else residual + y
    bias = None if bias is None else bias.contiguous()  # the operator reads it as if it were
    if residual is None:
        return _onednn(x, weight, bias, "none", [], "")
    return _onednn_add(x, residual, weight, bias, "add")


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad [M, H] @ weight [H, C]``."""
    return linear(grad, weight.t(), None) if _runs(_onednn_backward, grad, weight.shape[1]) else grad @ weight


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """``grad [M, H]' @ x [M, C]`` in the statistics dtype."""
    if not _runs(_onednn_backward, x, grad.shape[1]):
        return cast(grad.t() @ x, statistics_dtype(x.dtype))
    rows, out_c, in_c = x.shape[0], grad.shape[1], x.shape[1]
    # Two paths, chosen by measurement (docs/kernels/mlp.md). oneDNN's linear does not split the sum over rows, so a
    # small result of many rows goes to the weight gradient of a convolution, which does.
    if min(out_c, in_c) < 64 or (out_c > in_c and rows > 3 * in_c):
        return _conv_weight_grad(grad, x)
    # the operator would copy a transposed first operand element by element
    return linear(torch.ops.convnextv2_kernels.transpose_rows.default(grad.contiguous()), x.t(), None)


def _conv_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """The same GEMM as the weight gradient of a 1x1 convolution over one row of pixels, channels last."""
    rows, out_c = grad.shape
    in_c = x.shape[1]
    g = grad.view(1, 1, rows, out_c).permute(0, 3, 1, 2)
    i = x.view(1, 1, rows, in_c).permute(0, 3, 1, 2)
    w = x.new_empty(1).expand(out_c, in_c, 1, 1)
    args = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(g, i, w, None, *args)[1].view(out_c, in_c)
