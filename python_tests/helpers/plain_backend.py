"""The contract of a backend's MLP in plain PyTorch: what ``backends/base.py`` says, written down a second time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from convnextv2_kernels.backends.base import KernelBackend
from convnextv2_kernels.dtypes import statistics_dtype


def _owner(rows: int, segments) -> torch.Tensor:
    offsets, rows_per_slot, count = segments
    if offsets is None:
        return torch.arange(count).repeat_interleave(rows // max(count, 1))
    return torch.arange(count).repeat_interleave(offsets.diff().long() * rows_per_slot)


def _sums(x, owner, count):
    return x.new_zeros(count, x.shape[-1]).index_add(0, owner, x)


def _form(act):
    return "tanh" if act == "gelu_tanh" else "none"


class PlainBackend(KernelBackend):
    """Row passes and GRN's two GEMMs by the formulas; it has no convolution."""

    name = "plain"
    folds_layer_norm = False

    def unsupported_reason(self, device_type, dtype, index=None):
        return None

    def column_sum(self, x):
        return x.sum(0, dtype=statistics_dtype(x.dtype))

    def normalized_backward(self, dy, z, rstd, weight):
        g, n = dy.to(rstd.dtype), z.to(rstd.dtype)
        gw = g if weight is None else g * weight
        dx = rstd.unsqueeze(-1) * (gw - gw.mean(-1, keepdim=True) - n * (gw * n).mean(-1, keepdim=True))
        if weight is None:
            return dx.to(dy.dtype), None, None
        return dx.to(dy.dtype), (g * n).sum(0), g.sum(0)

    def gelu_statistics(self, a, h, gamma, segments, options):
        activations = F.gelu(a, approximate=_form(options.act))
        if h is not None:
            h.copy_(activations)
        stat = activations.to(gamma.dtype)
        norm = _sums(stat.square(), _owner(a.shape[0], segments), segments.count).sqrt()
        return norm, self._scale(norm, gamma, options.eps)

    def gelu_scale(self, a, out, scale, segments, act):
        h = F.gelu(a, approximate=_form(act))
        out.copy_(h if scale is None else h * scale[_owner(a.shape[0], segments)])

    def mlp_backward_statistics(self, a, ds, t, norm, gamma, segments, options):
        if t is None:
            h = F.gelu(a.to(norm.dtype), approximate=_form(options.act))
            t = _sums(ds.to(norm.dtype) * h, _owner(a.shape[0], segments), segments.count)
        mean = norm.mean(-1, keepdim=True) + options.eps
        dq = gamma * t
        dnorm = dq / mean - (dq * norm).sum(-1, keepdim=True) / (norm.shape[-1] * mean.square())
        kappa = torch.where(norm > 0, dnorm / torch.where(norm > 0, norm, 1.0), 0.0)
        return self._scale(norm, gamma, options.eps), kappa, (norm / mean * t).sum(0)

    def mlp_backward_pointwise(self, a, ds, scales, hs, da, segments, act):
        owner, stat = _owner(a.shape[0], segments), scales[0].dtype
        scale, kappa = (t[owner] for t in scales)
        wide = a.to(stat)
        h = F.gelu(wide, approximate=_form(act))
        grad = torch.ops.aten.gelu_backward(ds.to(stat) * scale + h * kappa, wide, approximate=_form(act))
        if hs is not None:
            hs.copy_(h * scale)
        da.copy_(grad)
        return grad.sum(0)

    def gelu_grn_linear(self, a, weights, residual, images, options, preserve_a):
        segments = options.segments(images)
        norm, scale = self.gelu_statistics(a, None, weights.gamma, segments, options)
        h = F.gelu(a, approximate=_form(options.act)).to(scale.dtype)
        grn = h * scale[_owner(a.shape[0], segments)] + weights.beta
        y = F.linear(grn.to(a.dtype), weights.w2, weights.b2)
        return y if residual is None else residual + y, norm

    def gelu_grn_linear_backward(self, chunk, weights, options):
        segments, stat = options.segments(chunk.images), weights.gamma.dtype
        ds = (chunk.d @ weights.w2).to(stat)
        scale, kappa, dgamma = self.mlp_backward_statistics(
            chunk.a, ds, None, chunk.norm, weights.gamma, segments, options
        )
        hs, da = torch.empty_like(chunk.a), torch.empty_like(chunk.a)
        da_sum = self.mlp_backward_pointwise(chunk.a, ds, (scale, kappa), hs, da, segments, options.act)
        return da, da_sum, dgamma, chunk.d.to(stat).t() @ (hs.to(stat) + weights.beta)

    def gemms_reduce(self, g, w2):
        return torch.einsum("noh,oh->nh", g, w2)

    def gemms_weight(self, g, scale, d_sum, beta):
        return torch.einsum("noh,nh->oh", g, scale) + torch.outer(d_sum, beta)

    @staticmethod
    def _scale(norm, gamma, eps):
        return 1 + gamma * norm / (norm.mean(-1, keepdim=True) + eps)
