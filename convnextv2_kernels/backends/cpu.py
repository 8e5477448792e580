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

    def gelu_statistics(
        self, a: Tensor, h: Tensor | None, gamma: Tensor, segments: Segments, options: MLPOptions
    ) -> tuple[Tensor, Tensor]:
        h = a.clone() if h is None else h.copy_(a)
        square_sum = self.operators.gelu_square_sum_.default(h, options.act == "gelu_tanh", *segments)
        return self.operators.grn_scale.default(square_sum, gamma, options.eps)

    def gelu_scale(self, a: Tensor, out: Tensor, scale: Tensor | None, segments: Segments, act: str) -> None:
        raise NotImplementedError

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
        raise NotImplementedError

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
        raise NotImplementedError

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
        ops, segments = self.operators, options.segments(images)
        h = a.clone() if preserve_a else a
        square_sum = ops.gelu_square_sum_.default(h, options.act == "gelu_tanh", *segments)
        norm, scale = ops.grn_scale.default(square_sum, weights.gamma, options.eps)
        rows = segments.rows_each(h.shape[0])
        # GRN goes into weight and bias where an image has more rows than the weight
        if rows is not None and rows > 2 * weights.w2.shape[0]:
            return _linear_by_image(h, weights, scale, residual, rows), norm
        ops.scale_rows_.default(h, scale, weights.beta, *segments)
        return cpu_gemm.linear(h, weights.w2, weights.b2, residual), norm

    def gelu_grn_linear_backward(
        self, chunk: MLPGradRows, weights: MLPParams, options: MLPOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Overwrites a with the GRN output, whose product with d is the weight's gradient, and ds with da."""
        ops, segments, tanh = self.operators, options.segments(chunk.images), options.act == "gelu_tanh"
        a = chunk.a.clone() if chunk.preserve_a else chunk.a
        scale = ops.grn_scale.default(chunk.norm.square(), weights.gamma, options.eps)[1]
        ds = cpu_gemm.linear_input_grad(chunk.d, weights.w2)
        t = ops.mlp_backward_reduce.default(a, ds, tanh, *segments)
        kappa, dgamma = ops.grn_gradient.default(t, chunk.norm, weights.gamma, options.eps)
        da_sum = ops.mlp_backward_pointwise_.default(a, ds, scale, kappa, weights.beta, tanh, *segments)
        return ds, da_sum, dgamma, cpu_gemm.linear_weight_grad(chunk.d, a)


def _linear_by_image(h: Tensor, weights: MLPParams, scale: Tensor, residual: Tensor | None, rows: int) -> Tensor:
    """``GRN(h) w2' + b2 [+ residual]`` by one GEMM an image, with its scale in the weight and beta in the bias."""
    w2, b2, beta = weights.w2, weights.b2, weights.beta
    bias = (b2 + w2.to(beta.dtype) @ beta).to(h.dtype)
    parts = h.split(rows)
    adds = [None] * len(parts) if residual is None else residual.split(rows)
    outs = [
        cpu_gemm.linear(part, (w2 * s).to(h.dtype), bias, add) for part, s, add in zip(parts, scale, adds, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)
