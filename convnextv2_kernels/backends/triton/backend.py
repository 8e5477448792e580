"""The Triton backend, and CUDA's kernels with Triton's fused GEMMs.

This module does not import Triton: kernels are imported on first use, so a missing Triton costs nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil

import torch
from torch import Tensor

from ...params import MLPGradResult, MLPGradRows, MLPOptions, MLPParams, MLPResult, MLPRows, NormParams, Segments
from ...settings import current
from ..base import KernelBackend
from ..cuda import CUDABackend

INTERPRETED = current.triton_interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter truncates to bfloat16 instead of rounding, and multiplies its bits as integers
DTYPES = (torch.float32, torch.float64, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
_OLDEST = (3, 6)
# names of the packages in which PyTorch's builds install the module
_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")


def version() -> str | None:
    """Version of Triton, or None without it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return importlib.import_module("triton").__version__


def _find_load_error() -> str | None:
    found = version()
    if found is None:
        return "triton is not installed"
    parts = re.match(r"(\d+)\.(\d+)", found)
    if parts is not None and tuple(map(int, parts.groups())) < _OLDEST:
        return f"its kernels need triton {_OLDEST[0]}.{_OLDEST[1]} or newer, and {found} is installed"
    return None


# found once: package metadata cannot be read while torch.compile traces
_load_error = _find_load_error()


def load_error() -> str | None:
    """Why the kernels are not available, or None."""
    return _load_error


@functools.lru_cache
def _find_device_error(index: int | None) -> str | None:
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if not any(shutil.which(name) for name in compilers if name):
        return "Triton needs a C compiler when it runs, and there is none (CC, gcc, clang)"
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    return f"its kernels need a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}"


@torch.compiler.assume_constant_result
def _device_error(index: int | None) -> str | None:
    """Why Triton does not compile for a GPU, by default the current one, or None."""
    return _find_device_error(index)


def unsupported_reason(device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Why Triton's kernels cannot run on tensors of this device and dtype, or None."""
    if _load_error is not None:
        return _load_error
    if device_type != DEVICE:
        kind = "interpreted kernels serve" if INTERPRETED else "kernels serve"
        return f"its {kind} tensors on {DEVICE}, and the input lies on {device_type}"
    if dtype not in DTYPES:
        names = [str(known).removeprefix("torch.") for known in DTYPES]
        return f"its kernels serve {', '.join(names[:-1])} and {names[-1]}, and the input is {dtype}"
    return _device_error(index)


class FusedMLP(KernelBackend):
    """The MLP with fused GEMMs where the plan of its shape has them (``plans.py``), otherwise as in the base class."""

    def mlp_forward(self, rows: MLPRows, weights: MLPParams, options: MLPOptions) -> MLPResult:
        from . import mlp

        (hidden, width), out = weights.w1.shape, weights.w2.shape[0]
        plan = mlp.plan_for(rows.x, width, hidden, out, rows.images)
        if plan.forward_fused:
            result = mlp.fused_forward(rows, weights, options, plan)
            if result is not None:
                return result
        return super().mlp_forward(rows, weights, options)

    def mlp_backward(self, chunk: MLPGradRows, weights: MLPParams, options: MLPOptions) -> MLPGradResult:
        from . import mlp

        (hidden, width), out = weights.w1.shape, weights.w2.shape[0]
        plan = mlp.plan_for(chunk.a, width, hidden, out, chunk.images)
        if plan.backward_fused:
            return mlp.fused_backward(chunk, weights, options, plan)
        return super().mlp_backward(chunk, weights, options)

    def scaled_weight_grad(
        self, chunk: MLPGradRows, scale: Tensor, weights: MLPParams, options: MLPOptions
    ) -> Tensor | None:
        from . import mlp

        hidden, out = chunk.a.shape[1], chunk.d.shape[1]
        tile = mlp.plan_for(chunk.a, out, hidden, out, options.segments(chunk.images)).weight
        return None if tile is None else mlp.weight_grad(chunk, scale, weights.beta, options, tile)


class TritonBackend(FusedMLP):
    """Triton kernels, compiled on the user's machine: no nvcc, NVIDIA and AMD GPUs.

    With ``TRITON_INTERPRET=1`` in the environment Triton runs kernels in Python on the CPU. Then this backend runs on
    CPU tensors, and only those; it is very slow, for tests, and never chosen by ``auto``."""

    name = "triton"
    device_type = DEVICE

    @functools.cached_property
    def operators(self):
        from . import conv, conv_grad, grn, norm, norm_grad, patches, reduce  # noqa: F401  (each registers its own)
        from .launch import NAMESPACE

        return getattr(torch.ops, NAMESPACE)

    def unsupported_reason(self, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
        return unsupported_reason(device_type, dtype, index)

    def normalized_backward(
        self, dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if weight is None:
            from .norm_grad import normalized_backward_input

            return normalized_backward_input(dy, z, rstd), None, None
        return self.operators.normalized_backward.default(dy, z, rstd, weight)

    def prepare_mlp(self, params: MLPParams, layer_norm: NormParams | None, like: Tensor) -> MLPParams:
        """In one launch; ``W2 beta`` is part of the second bias."""
        from .weights import mlp_parameters

        return mlp_parameters(params, layer_norm, like)

    def unfold_layer_norm(
        self, w1: Tensor, layer_norm: NormParams, dw1: Tensor, db1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from .weights import unfold_layer_norm

        return unfold_layer_norm(w1, layer_norm, dw1, db1)

    def gelu_statistics(
        self, a: Tensor, h: Tensor | None, gamma: Tensor, segments: Segments, options: MLPOptions
    ) -> tuple[Tensor, Tensor]:
        from .mlp_rows import gelu_statistics

        return gelu_statistics(a, h, gamma, options.eps, options.act, segments)

    def gelu_scale(self, a: Tensor, out: Tensor, scale: Tensor | None, segments: Segments, act: str) -> None:
        from .mlp_rows import scale_rows

        scale_rows(a, out, scale, None, act, segments)

    def mlp_backward_statistics(
        self,
        a: Tensor | None,
        ds: Tensor | None,
        t: Tensor | None,
        norm: Tensor,
        gamma: Tensor,
        segments: Segments,
        options: MLPOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from .mlp_rows import mlp_backward_statistics

        return mlp_backward_statistics(a, ds, t, norm, gamma, options.eps, options.act, segments)

    def mlp_backward_pointwise(
        self,
        a: Tensor,
        ds: Tensor,
        scales: tuple[Tensor, Tensor],
        hs: Tensor | None,
        da: Tensor,
        segments: Segments,
        act: str,
    ) -> Tensor:
        from .mlp_rows import mlp_backward_pointwise

        return mlp_backward_pointwise(a, ds, scales, hs, da, act, segments)

    def gemms_reduce(self, g: Tensor, w2: Tensor) -> Tensor:
        from .weights import products_reduce

        return products_reduce(g, w2)

    def gemms_weight(self, g: Tensor, scale: Tensor, d_sum: Tensor, beta: Tensor) -> Tensor:
        from .weights import products_weight

        return products_weight(g, scale, d_sum, beta)


class CUDATritonBackend(FusedMLP, CUDABackend):
    """CUDA's kernels with Triton's fused GEMMs in the MLP: ``auto``'s choice if both are available."""

    name = "cuda+triton"

    def unsupported_reason(self, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
        reason = super().unsupported_reason(device_type, dtype, index)
        return unsupported_reason(device_type, dtype, index) if reason is None else reason
