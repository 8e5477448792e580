"""The Triton backend, and CUDA's kernels with Triton's fused GEMMs.

This module does not import Triton: kernels are imported on first use, so a missing Triton costs nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...params import (
    MLPGradResult,
    MLPGradRows,
    MLPOptions,
    MLPParams,
    MLPResult,
    MLPRows,
    NormParams,
    Places,
    RowNorm,
    Segments,
)
from ..base import KernelBackend
from ..cuda import CUDABackend
from .availability import DEVICE, unsupported_reason

if TYPE_CHECKING:
    from .plans import Plan


class FusedMLP(KernelBackend):
    """The MLP with fused GEMMs where the plan of its shape has them (``plans.py``), otherwise as in the base class."""

    def mlp_forward(self, rows: MLPRows, weights: MLPParams, options: MLPOptions) -> MLPResult:
        from . import mlp

        def run(plan: Plan) -> MLPResult:
            result = mlp.fused_forward(rows, weights, options, plan) if plan.forward_fused else None
            return super(FusedMLP, self).mlp_forward(rows, weights, options) if result is None else result

        (hidden, width), out = weights.w1.shape, weights.w2.shape[0]
        return mlp.by_plan(
            mlp.shape_of(rows.total, weights.w1.dtype, (width, hidden, out), rows.images), rows.x.device.index, run
        )

    def mlp_backward(self, chunk: MLPGradRows, weights: MLPParams, options: MLPOptions) -> MLPGradResult:
        from . import mlp

        def run(plan: Plan) -> MLPGradResult:
            if plan.backward_fused:
                return mlp.fused_backward(chunk, weights, options, plan)
            return super(FusedMLP, self).mlp_backward(chunk, weights, options)

        (hidden, width), out = weights.w1.shape, weights.w2.shape[0]
        return mlp.by_plan(
            mlp.shape_of(chunk.a.shape[0], chunk.a.dtype, (width, hidden, out), chunk.images), chunk.a.device.index, run
        )

    def scaled_weight_grad(
        self, chunk: MLPGradRows, scale: Tensor, weights: MLPParams, options: MLPOptions
    ) -> Tensor | None:
        from . import mlp

        def run(plan: Plan) -> Tensor | None:
            return None if plan.weight is None else mlp.weight_grad(chunk, scale, weights.beta, options, plan.weight)

        (count, hidden), out = chunk.a.shape, chunk.d.shape[1]
        shape = mlp.shape_of(count, chunk.a.dtype, (out, hidden, out), options.segments(chunk.images))
        return mlp.by_plan(shape, chunk.a.device.index, run)


class TritonBackend(FusedMLP):
    """Triton kernels, compiled on the user's machine: no nvcc, NVIDIA and AMD GPUs.

    With ``TRITON_INTERPRET=1`` in the environment Triton runs kernels in Python on the CPU. Then this backend runs on
    CPU tensors, and only those; it is very slow, for tests, and never chosen by ``auto``."""

    name = "triton"
    device_type = DEVICE

    @functools.cached_property
    def operators(self):
        # each registers its own
        from . import conv, conv_grad, grn, layer_norm_grn, norm, norm_grad, patches, reduce  # noqa: F401
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

    def gather_normalize(self, x: Tensor, places: Places, norm: RowNorm) -> tuple[Tensor, Tensor]:
        from .norm import gather_normalize

        return gather_normalize(x, places, norm)

    def normalized_backward_put(
        self, dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, places: Places, dx: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        from .norm_grad import normalized_backward_put

        return normalized_backward_put(dy, z, rstd, weight, places, dx)

    def put_patches(self, x: Tensor, places: Places, out: Tensor) -> None:
        from .patches import put_patches

        put_patches(x, places, out)

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
