"""The CPU backend: C++ kernels of ``csrc/cpu``, GEMMs by PyTorch's vendor libraries (``cpu_gemm.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..params import MLPGradRows, MLPOptions, MLPParams, Segments
from . import cpu_gemm, native
from .native import NativeBackend


class CPUBackend(NativeBackend):
    name = "cpu"
    device_type = "cpu"
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    # a pass over the weights costs more than it saves at a CPU's batch sizes (docs/kernels/math.md)
    folds_layer_norm = False

    def load_error(self) -> str | None:
        return native.load_error

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cpu_gemm.linear(x, weight, bias)

    def linear_input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        return cpu_gemm.linear_input_grad(grad, weight)

    def linear_weight_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return cpu_gemm.linear_weight_grad(grad, x)

    def gelu_grn_linear(
        self,
        a: Tensor,
        weights: MLPParams,
        residual: Tensor | None,
        images: Segments,
        options: MLPOptions,
        preserve_a: bool,
    ) -> tuple[Tensor, Tensor]:
        """Turns a into act(a) in place, and applies GRN in place or through the weight."""
        segments = options.segments(images)
        h = torch.empty_like(a) if preserve_a else a
        norm, scale = self.gelu_statistics(a, h, weights.gamma, segments, options)
        rows = segments.rows_each(h.shape[0])
        # GRN goes into weight and bias where an image has more rows than the weight
        if rows is not None and rows > 2 * weights.w2.shape[0]:
            return _linear_by_image(h, weights, scale, residual, rows), norm
        # h is activated already
        self.operators.gelu_scale.default(h, h, scale, False, *segments, beta=weights.beta, gelu=False)
        return cpu_gemm.linear(h, weights.w2, weights.b2, residual), norm

    def gelu_grn_linear_backward(
        self, chunk: MLPGradRows, weights: MLPParams, options: MLPOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Overwrites a with GRN's output, from which a GEMM with d gives the weight's gradient."""
        a, segments, tanh = chunk.a, options.segments(chunk.images), options.act == "gelu_tanh"
        ds = cpu_gemm.linear_input_grad(chunk.d, weights.w2)
        statistics = self.mlp_backward_statistics(a, ds, None, chunk.norm, weights.gamma, segments, options)
        scale, kappa, dgamma = statistics
        grn = torch.empty_like(a) if chunk.preserve_a else a
        da_sum = self.operators.mlp_backward_pointwise.default(
            a, ds, scale, kappa, grn, ds, tanh, *segments, beta=weights.beta
        )
        return ds, da_sum, dgamma, cpu_gemm.linear_weight_grad(chunk.d, grn)


def _linear_by_image(h: Tensor, weights: MLPParams, scale: Tensor, residual: Tensor | None, rows: int) -> Tensor:
    """``GRN(h) w2' + b2 [+ residual]`` by one GEMM an image, with its scale in the weight and beta in the bias."""
    w2, b2, beta = weights.w2, weights.b2, weights.beta
    assert b2 is not None  # as in every forward
    bias = (b2 + w2.to(beta.dtype) @ beta).to(h.dtype)
    parts = h.split(rows)
    adds = [None] * len(parts) if residual is None else residual.split(rows)
    outs = [
        cpu_gemm.linear(part, (w2 * s).to(h.dtype), bias, add) for part, s, add in zip(parts, scale, adds, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)
