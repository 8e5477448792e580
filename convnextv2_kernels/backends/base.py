"""What a backend is: :class:`Backend` says what it runs, :class:`KernelBackend` is the contract of one with kernels.

A new backend is a subclass of :class:`KernelBackend`, an entry of ``REGISTRY`` in ``backends/__init__.py``, and a line
in ``python_tests/conformance/backends.py``.

Shapes as in :mod:`..params`. Features have the dtype T of the call; parameters, statistics and parameter gradients are
float32 (float64 for float64 features), contiguous. A kernel may overwrite the arguments that its docstring names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import cast, statistics_dtype
from ..params import (
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


class Backend(ABC):
    """Names a way to compute the ops, and says for which tensors it can."""

    name: ClassVar[str]
    # the device its tensors live on; None: any
    device_type: str | None = None

    @abstractmethod
    def unsupported_reason(self, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
        """Why it cannot run ops on tensors of this device and dtype, or None if it can. ``index``: of the device, by
        default the current one."""


class KernelBackend(Backend):
    """Kernels behind the ops: operators of one ``torch.ops`` namespace, row passes, and the MLP made of both.

    Convolution, norms and copies are operators of the same schemas in every namespace (``csrc/torch``); the methods
    below only name them. A backend overrides what it computes otherwise: GEMMs with their surroundings fused,
    for instance, are an override of :meth:`mlp_forward` and :meth:`mlp_backward`.
    """

    # whether LayerNorm's affine part goes into the first GEMM's weight and bias, so that its output is never formed
    folds_layer_norm: ClassVar[bool] = True

    # the namespace of ``torch.ops`` that holds its operators
    operators: Any

    # -- depthwise convolution: x is [maps, H, W, C], or packed [P, s, s, C] with neighbours [P, (2r + 1)^2] int32

    def depthwise_conv_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        neighbours: Tensor | None,
        flip: bool = False,
    ) -> Tensor:
        """Convolution by ``weight [C, 1, K, K]``, rotated by 180 degrees with ``flip``, which makes it the gradient of
        the input; bias ``[C]`` and residual, like x, are added before the result is rounded to T."""
        return self.operators.depthwise_conv_forward.default(x, weight, bias, residual, neighbours, flip)

    def depthwise_conv_normalize(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        neighbours: Tensor | None,
        layer_norm: tuple[Tensor | None, Tensor | None],
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm over the channels of the convolution, like x, and its 1/std ``[maps, H, W]``. ``layer_norm``:
        weight and bias ``[C]``; without them the normalised rows. The convolution's output is never stored."""
        return self.operators.depthwise_conv_normalize.default(x, weight, bias, neighbours, *layer_norm, eps)

    def depthwise_conv_backward_weight(
        self, grad: Tensor, x: Tensor, neighbours: Tensor | None, kernel_size: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the weight ``[C, 1, K, K]`` and of the bias ``[C]``."""
        return self.operators.depthwise_conv_backward_weight.default(grad, x, neighbours, kernel_size)

    # -- norms

    def layer_norm_forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``x [..., C]`` -> LayerNorm, like x; mean and 1/std ``[...]``."""
        return self.operators.layer_norm_forward.default(x, weight, bias, eps)

    def layer_norm_backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        return self.operators.layer_norm_backward.default(grad, x, mean, rstd, weight)

    def normalized_backward(
        self, dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """LayerNorm's backward from its normalised rows ``z = (x - mean) * rstd``: gradients of x, weight and bias.
        Without a weight, as only a backend with ``folds_layer_norm`` is called, of x alone."""
        if weight is None:
            return self.operators.normalized_backward_input.default(dy, z, rstd), None, None
        return self.operators.normalized_backward.default(dy, z, rstd, weight)

    def grn_forward(
        self, x: Tensor, gamma: Tensor, beta: Tensor, segments: Segments, gelu: bool, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``x [..., C]`` -> GRN of x, or of GELU(x) with ``gelu``, like x; its norm ``[segments, C]``."""
        return self.operators.grn_forward.default(x, gamma, beta, *segments, gelu, eps)

    def grn_backward(
        self, grad: Tensor, x: Tensor, gamma: Tensor, norm: Tensor, segments: Segments, gelu: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, gamma and beta."""
        return self.operators.grn_backward.default(grad, x, gamma, norm, *segments, gelu, eps)

    def layer_norm_grn_forward(
        self,
        x: Tensor,
        layer_norm: NormParams,
        gamma: Tensor,
        beta: Tensor,
        segments: Segments,
        ln_eps: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x [..., C]`` -> GRN(LN(x)), like x; LayerNorm's mean and 1/std ``[...]``; GRN's norm ``[segments, C]``.
        LN(x) is never stored."""
        return self.operators.layer_norm_grn_forward.default(x, *layer_norm, gamma, beta, *segments, ln_eps, eps)

    def layer_norm_grn_backward(
        self,
        grad: Tensor,
        x: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        layer_norm: NormParams,
        gamma: Tensor,
        segments: Segments,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, LayerNorm's weight and bias, gamma and beta. ``statistics``: mean, 1/std and norm."""
        mean, rstd, norm = statistics
        return self.operators.layer_norm_grn_backward.default(
            grad, x, mean, rstd, *layer_norm, gamma, norm, *segments, eps
        )

    def column_sum(self, x: Tensor) -> Tensor:
        """``[M, C] -> [C]``, a statistic."""
        return self.operators.column_sum.default(x)

    # -- resampling: LayerNorm into 2x2 blocks of pixels, [maps, 2h, 2w, C] <-> [maps, h, w, 4C]

    def space_to_depth_normalize(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``y [maps, h, w, 4C]``, LayerNorm of every pixel; its 1/std ``[maps, 2h, 2w]``."""
        return self.operators.space_to_depth_normalize.default(x, weight, bias, eps)

    def space_to_depth_normalize_backward(
        self, dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From normalised rows ``z [maps, h, w, 4C]``: gradients of x, weight and bias."""
        return self.operators.space_to_depth_normalize_backward.default(dy, z, rstd, weight)

    # -- patches: patch_of_slot [P] and slot_of_patch [N, Gh * Gw] int32, the fields of PatchLayout; grid (Gh, Gw)

    def gather_patches(self, x: Tensor, patch_of_slot: Tensor, grid: tuple[int, int]) -> Tensor:
        """``[N, Gh * s, Gw * s, C] -> [P, s, s, C]``."""
        return self.operators.gather_patches.default(x, patch_of_slot, *grid)

    def scatter_patches(self, x: Tensor, slot_of_patch: Tensor, grid: tuple[int, int], fill: Tensor | None) -> Tensor:
        """``[P, s, s, C] -> [N, Gh * s, Gw * s, C]``; hidden sites hold ``fill [C]`` of T, or zero."""
        return self.operators.scatter_patches.default(x, slot_of_patch, *grid, fill)

    # -- rows that are read from their places in a dense map x [N, Gh * s, Gw * s, C], and gradients written there

    def gather_normalize(self, x: Tensor, places: Places, norm: RowNorm) -> tuple[Tensor, Tensor]:
        """LayerNorm of the rows at ``places [P, s, s, C]``, which are read once, and its 1/std ``[P, s, s]``."""
        return self.operators.gather_normalize.default(x, places.patch_of_slot, *places.grid, *norm)

    def normalized_backward_put(
        self, dy: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, places: Places, dx: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`normalized_backward`, ``dy`` and ``z [P * s * s, C]``, whose gradient of x is written to its places in
        the map dx; other sites keep their values. Returns the gradients of weight and bias, None without a weight."""
        sums = self.operators.normalized_backward_put.default(
            dy, z, rstd, weight, places.patch_of_slot, *places.grid, dx
        )
        return (None, None) if weight is None else sums

    def put_patches(self, x: Tensor, places: Places, out: Tensor) -> None:
        """Writes ``x [P * s * s, C]`` to its places in the map ``out``; other sites keep their values."""
        self.operators.put_patches.default(x, places.patch_of_slot, *places.grid, out)

    def patch_pixels(self, images: Tensor, patch_of_slot: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """``[N, in, H, W]`` -> the 4x4 blocks of pixels of visible patches ``[P, s, s, 16 * in]``; of all without
        ``patch_of_slot``, ``[N, H / 4, W / 4, 16 * in]``, grid ``(H / 4, W / 4)``."""
        return self.operators.patch_pixels.default(images, patch_of_slot, *grid)

    def gathered_rows(self, x: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
        """The rows at ``places [P * s * s, C]`` as operands of a vendor's GEMM, which takes contiguous ones only."""
        return cast(self.gather_patches(x, places.patch_of_slot, places.grid), dtype).view(-1, x.shape[-1])

    # -- GEMMs, by the vendor's library

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x [M, C] @ weight [H, C]' + bias [H]``, all of T."""
        return F.linear(x, weight, bias)

    def linear_input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """``grad [M, H] @ weight [H, C]``."""
        return grad @ weight

    def linear_weight_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        """``grad [M, H]' @ x [M, C]``, a statistic."""
        return statistics_gemm(grad.t(), x)

    # -- weights

    def prepare_mlp(self, params: MLPParams, layer_norm: NormParams | None, like: Tensor) -> MLPParams:
        """Operands of the GEMMs in T, the dtype of ``like``; gamma and beta are statistics already.

        ``layer_norm`` is folded into the first weight and bias, ``z W1f' + b1f = (z * weight + bias) W1' + b1``; only a
        backend with ``folds_layer_norm`` is given it. A backend may put ``W2 beta`` into the second bias."""
        w1, b1, gamma, beta, w2, b2 = params
        if layer_norm is not None:
            weight, bias = (t.to(statistics_dtype(like.dtype)) for t in layer_norm)
            b1, w1 = b1 + w1.to(bias.dtype) @ bias, w1 * weight
        dtype = like.dtype
        if w1.dtype is w2.dtype is b1.dtype is dtype and (b2 is None or b2.dtype is dtype):
            return MLPParams(w1, b1, gamma, beta, w2, b2)
        b2 = None if b2 is None else cast(b2, dtype)
        return MLPParams(cast(w1, dtype), cast(b1, dtype), gamma, beta, cast(w2, dtype), b2)

    def unfold_layer_norm(
        self, w1: Tensor, layer_norm: NormParams, dw1: Tensor, db1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of w1 and of LayerNorm's weight and bias from those of the folded weight and bias, all statistics;
        may overwrite dw1."""
        w1, weight, bias = (t.to(dw1.dtype) for t in (w1, *layer_norm))
        return dw1 * weight + torch.outer(db1, bias), (w1 * dw1).sum(0), db1 @ w1

    # -- row passes over hidden rows [M, H] of T; scale, kappa, norm and t are statistics [segments, H]

    @abstractmethod
    def gelu_statistics(
        self, a: Tensor, h: Tensor | None, gamma: Tensor, segments: Segments, options: MLPOptions
    ) -> tuple[Tensor, Tensor]:
        """GRN's norm and scale ``1 + gamma * norm / (mean of norm + eps)`` of ``act(a)``, which is written to h unless
        that is None; h may be a."""

    @abstractmethod
    def gelu_scale(self, a: Tensor, out: Tensor, scale: Tensor | None, segments: Segments, act: str) -> None:
        """``out = act(a) * scale``, 1 without a scale; out may be a."""

    @abstractmethod
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
        """scale, kappa and the gradient of gamma ``[H]``, from ``t``, the sums of ``ds * act(a)`` over the rows of each
        segment, or from a and ds. kappa is the gradient of norm over norm, 0 where norm is 0."""

    @abstractmethod
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
        """``da = (ds * scale + act(a) * kappa) * act'(a)``, may be ds, with ``scales`` scale and kappa; ``hs = act(a) *
        scale`` unless None, may be a. Returns the column sums of da ``[H]``, of values before they are rounded."""

    def scaled_weight_grad(
        self, chunk: MLPGradRows, scale: Tensor, weights: MLPParams, options: MLPOptions
    ) -> Tensor | None:
        """``d' (act(a) * scale + beta) [O, H]`` in one kernel, or None: by the vendor's GEMM."""
        return None

    def gemms_reduce(self, g: Tensor, w2: Tensor) -> Tensor:
        """``sum over o of g[n, o] * w2[o]``: ``g [N, O, H]`` a statistic, ``w2 [O, H]`` of T -> ``[N, H]``."""
        return (g * w2).sum(1)

    def gemms_weight(self, g: Tensor, scale: Tensor, d_sum: Tensor, beta: Tensor) -> Tensor:
        """``sum over n of g[n] * scale[n] + outer(d_sum, beta)``, ``[O, H]``."""
        return torch.addr((g * scale.unsqueeze(1)).sum(0), d_sum, beta)

    # -- the MLP of a chunk, composed of the above (the algebra: docs/kernels/mlp.md)

    def mlp_forward(self, rows: MLPRows, weights: MLPParams, options: MLPOptions) -> MLPResult:
        """``residual + drop_path_scale * (GRN(act(x w1' + b1)) w2' + b2)`` with operands of :meth:`prepare_mlp`."""
        x = rows.x if rows.places is None else self.gathered_rows(rows.x, rows.places, weights.w1.dtype)
        a = self.linear(x, weights.w1, weights.b1)
        del x
        saved = None
        if options.save == "hidden":
            saved = a if rows.hidden is None else rows.hidden.copy_(a)
        residual = rows.residual if rows.drop_path_scale is None else None
        out, norm = self.gelu_grn_linear(a, weights, residual, rows.images, options, preserve_a=saved is a)
        if rows.drop_path_scale is not None:
            out = scale_images_(out, rows.drop_path_scale, rows.images)
            out = out if rows.residual is None else rows.residual + out
        return MLPResult(cast(out, rows.out_dtype), norm, saved)

    def mlp_backward(self, chunk: MLPGradRows, weights: MLPParams, options: MLPOptions) -> MLPGradResult:
        """Gradients of a chunk up to the MLP's input, and with z on to LayerNorm's."""
        da, db1, dgamma, dw2 = self.gelu_grn_linear_backward(chunk, weights, options)
        dx = self.linear_input_grad(da, weights.w1)
        if chunk.places is not None:
            assert chunk.dx is not None
            dx = cast(dx, chunk.dx.dtype)
            if chunk.z is None or chunk.rstd is None:
                self.put_patches(dx, chunk.places, chunk.dx)
                return MLPGradResult(da, None, db1, dgamma, dw2)
            norm = self.normalized_backward_put(dx, chunk.z, chunk.rstd, chunk.ln_weight, chunk.places, chunk.dx)
            return MLPGradResult(da, None, db1, dgamma, dw2, *norm)
        if chunk.z is None or chunk.rstd is None:
            return MLPGradResult(da, dx, db1, dgamma, dw2)
        dx, dln_weight, dln_bias = self.normalized_backward(dx, chunk.z, chunk.rstd, chunk.ln_weight)
        return MLPGradResult(da, dx, db1, dgamma, dw2, dln_weight, dln_bias)

    def gelu_grn_linear(
        self,
        a: Tensor,
        weights: MLPParams,
        residual: Tensor | None,
        images: Segments,
        options: MLPOptions,
        preserve_a: bool,
    ) -> tuple[Tensor, Tensor]:
        """``GRN(act(a)) w2' + b2 [+ residual]``, of T or the residual's dtype, and GRN's norm; a may be overwritten
        unless it is to be preserved.

        Where an image has many more rows than the MLP has output channels, GRN's scale goes into one weight an image;
        else a pass forms ``h scale``. Beta is in b2 and touches no hidden tensor."""
        segments = options.segments(images)
        out_c, hidden = weights.w2.shape
        target = torch.empty_like(a) if preserve_a else a
        rows = _rows_for_gemm_by_image(a, out_c, segments)
        if rows is None:
            norm, scale = self.gelu_statistics(a, None, weights.gamma, segments, options)
            self.gelu_scale(a, target, scale, segments, options.act)
            y = F.linear(target, weights.w2, weights.b2)
        else:
            norm, scale = self.gelu_statistics(a, target, weights.gamma, segments, options)
            scaled = weights.w2.new_empty(scale.shape[0], out_c, hidden, dtype=a.dtype)
            torch.mul(weights.w2, scale.unsqueeze(1), out=scaled)  # rounded once, in one pass
            bias = weights.b2
            assert bias is not None
            y = torch.baddbmm(bias, target.view(-1, rows, hidden), scaled.transpose(1, 2)).view(-1, out_c)
        return y if residual is None else residual + y, norm

    def gelu_grn_linear_backward(
        self, chunk: MLPGradRows, weights: MLPParams, options: MLPOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``da [M, H]``, its column sums, and the gradients of gamma ``[H]`` and w2 ``[O, H]``.

        With ``ds = d w2`` and t as in :meth:`mlp_backward_statistics`: ``da = (ds * scale + h * kappa) * act'(a)``.
        ``G = d' h`` of each image, where that pays, gives t and the gradient of w2; else t is reduced from ds."""
        a, d, segments = chunk.a, chunk.d, options.segments(chunk.images)
        out_c, hidden = weights.w2.shape
        rows = _rows_for_gemm_by_image(a, out_c, segments)
        if rows is None:
            ds = d @ weights.w2
            scale, kappa, dgamma = self.mlp_backward_statistics(
                a, ds, None, chunk.norm, weights.gamma, segments, options
            )
            dw2 = self.scaled_weight_grad(chunk, scale, weights, options)
            hs = None if dw2 is not None else torch.empty_like(a) if chunk.preserve_a else a
            da_sum = self.mlp_backward_pointwise(a, ds, (scale, kappa), hs, ds, segments, options.act)
            if hs is not None:
                dw2 = torch.addr(self.linear_weight_grad(d, hs), chunk.d_sum, weights.beta)
            assert dw2 is not None
            return ds, da_sum, dgamma, dw2
        h = torch.empty_like(a)
        self.gelu_scale(a, h, None, segments, options.act)
        g = statistics_gemm(d.view(-1, rows, out_c).transpose(1, 2), h.view(-1, rows, hidden))
        del h
        t = self.gemms_reduce(g, weights.w2)
        scale, kappa, dgamma = self.mlp_backward_statistics(None, None, t, chunk.norm, weights.gamma, segments, options)
        dw2 = self.gemms_weight(g, scale, chunk.d_sum, weights.beta)
        ds = d @ weights.w2
        da_sum = self.mlp_backward_pointwise(a, ds, (scale, kappa), None, ds, segments, options.act)
        return ds, da_sum, dgamma, dw2


def mismatch(
    device_type: str, dtype: torch.dtype, own_device: str | None, own_dtypes: tuple[torch.dtype, ...], kind: str
) -> str | None:
    """Why tensors of a device and dtype are not those of a backend's kernels, or None. ``kind``: subject and verb."""
    if device_type != own_device:
        return f"its {kind} tensors on {own_device}, and the input lies on {device_type}"
    if dtype not in own_dtypes:
        *names, last = (str(known).removeprefix("torch.") for known in own_dtypes)
        return f"its kernels serve {', '.join(names)} and {last}, and the input is {dtype}"
    return None


def statistics_gemm(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y``, batched or not, in the statistics dtype: accumulators are not rounded to the operands' dtype."""
    stat = statistics_dtype(x.dtype)
    if stat == x.dtype:
        return x @ y
    if x.is_cuda and torch.version.hip is None:  # ROCm's libraries refuse some of these
        return (torch.mm if x.dim() == 2 else torch.bmm)(x, y, out_dtype=stat)
    return x.to(stat) @ y.to(stat)


def scale_images_(y: Tensor, scale: Tensor, images: Segments) -> Tensor:
    """Multiplies the rows ``y [M, C]`` of each image by its factor of ``scale [N]``, in place."""
    factors = scale.to(y.dtype)
    if images.offsets is None:
        if y.numel():
            y.view(images.count, -1, y.shape[-1]).mul_(factors[:, None, None])
        return y
    counts = images.offsets.diff().long() * images.rows_per_slot
    return y.mul_(factors.repeat_interleave(counts, output_size=y.shape[0])[:, None])


def _rows_for_gemm_by_image(a: Tensor, width: int, segments: Segments) -> int | None:
    """Rows of each image where a GEMM per image pays: equal shares of more than twice the width; else None."""
    rows = segments.rows_each(a.shape[0])
    return rows if rows is not None and rows > 2 * width else None
