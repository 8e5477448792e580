"""Each op of the library beside the plain PyTorch that masked dense execution uses for it.

What an op is called and which parameters it takes is in the tests' catalogue of op calls, ``conformance/samples.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from conformance.samples import Sample, make_sample
from torch import Tensor

from convnextv2_kernels import ops
from convnextv2_kernels.benchmark import counts
from convnextv2_kernels.benchmark.baseline import channel_norm, masked_grn, masked_mlp
from convnextv2_kernels.benchmark.counts import Work
from convnextv2_kernels.layout import PatchLayout

Params = Mapping[str, Tensor]
# Of an NCHW-shaped map in either memory format and keep [N, H, W, 1]; returns an NHWC-shaped map.
DenseOp = Callable[[Tensor, Params, Tensor], Tensor]

MLP = ("w1", "b1", "gamma", "beta", "w2", "b2")
_PLAIN = {"residual": False, "drop": False, "hidden": None}


@dataclass(frozen=True)
class OpSpec:
    """An op, its dense peers, and its counted work.

    Attributes:
        op: its public name.
        dense: name -> (memory layout of the input, function).
        work: (rows, taps, width, itemsize) -> :class:`Work`.
        axes: of its sample, besides the width.
        factor: input channels as a multiple of the stage's width.
        stride: sites of the input per site of the output, along one side.
    """

    name: str
    op: str
    dense: Mapping[str, tuple[str, DenseOp]]
    work: Callable[[int, int, int, int], Work]
    axes: Mapping[str, Any] = field(default_factory=dict)
    factor: int = 1
    stride: int = 1

    def sample(self, width: int) -> Sample:
        """A call of the op at a stage of this width, on one patch."""
        axes = dict(self.axes)
        if "out_c" in axes:
            axes["out_c"] *= width
        return make_sample(self.op, at=("one_cell", 2), c=self.factor * width, **axes)

    def parameters(self, width: int) -> dict[str, Tensor]:
        """The parameters of that call, in float64."""
        tensors = self.sample(width).tensors
        return {
            name: t.flatten() if name in ("gamma", "beta") else t for name, t in tensors.items() if _is_one(name, t)
        }

    def sparse(self, x: Tensor, parameters: Params, layout: PatchLayout) -> Tensor:
        """The library's op on packed patches."""
        given = {"layout": layout} if "layout" in self.sample_constants else {}
        return getattr(ops, self.op)(x, **parameters, **given)

    @property
    def sample_constants(self) -> frozenset[str]:
        return _constants(self.op)


def _is_one(name: str, tensor: Tensor | None) -> bool:
    return tensor is not None and name not in ("x", "residual")


@functools.cache
def _constants(op: str) -> frozenset[str]:
    return frozenset(make_sample(op).constants)


def _conv(x: Tensor, p: Params, prefix: str = "") -> Tensor:
    weight = p[f"{prefix}weight"]
    return F.conv2d(x, weight, p[f"{prefix}bias"], padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _dense_conv(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return _conv(x, p).permute(0, 2, 3, 1) * keep


def _dense_conv_norm(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return channel_norm(_conv(x, p), p["ln_weight"], p["ln_bias"]) * keep


def _dense_norm(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return channel_norm(x, p["weight"], p["bias"])


def _dense_gelu_grn(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return masked_grn(F.gelu(x.permute(0, 2, 3, 1)).mul_(keep), p["gamma"], p["beta"])


def _dense_mlp(kind: str) -> DenseOp:
    def run(x: Tensor, p: Params, keep: Tensor) -> Tensor:
        return masked_mlp(x.permute(0, 2, 3, 1), [p[k] for k in MLP], keep, kind)

    return run


def _dense_downsample(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    y = channel_norm(x, p["ln_weight"], p["ln_bias"]).permute(0, 3, 1, 2)
    y = F.conv2d(y, p["weight"], p["bias"], stride=2)
    return y.permute(0, 2, 3, 1) * keep


def _dense_block(kind: str) -> DenseOp:
    def run(x: Tensor, p: Params, keep: Tensor) -> Tensor:
        y = channel_norm(_conv(x, p, "dw_"), p["ln_weight"], p["ln_bias"])
        y = masked_mlp(y, [p[k] for k in MLP], keep, kind)
        return (x + y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    return run


def _both_layouts(function: DenseOp) -> dict[str, tuple[str, DenseOp]]:
    return {layout: (layout, function) for layout in ("nchw", "channels_last")}


SPECS = (
    OpSpec(
        "depthwise_conv",
        "submanifold_depthwise_conv2d",
        _both_layouts(_dense_conv),
        lambda rows, taps, width, size: counts.depthwise_conv(rows, taps, width, itemsize=size),
        {"k": 7},
    ),
    OpSpec(
        "depthwise_conv_layer_norm",
        "depthwise_conv_layer_norm",
        _both_layouts(_dense_conv_norm),
        lambda rows, taps, width, size: counts.depthwise_conv_layer_norm(rows, taps, width, itemsize=size),
        {"k": 7},
    ),
    OpSpec(
        "layer_norm",
        "layer_norm",
        {"channels_last": ("channels_last", _dense_norm)},
        lambda rows, taps, width, size: counts.layer_norm(rows, width, size),
    ),
    OpSpec(
        "gelu_grn",
        "gelu_grn",
        {"channels_last": ("channels_last", _dense_gelu_grn)},
        lambda rows, taps, width, size: counts.gelu_grn(rows, 4 * width, size),
        factor=4,
    ),
    OpSpec(
        "pointwise_mlp",
        "pointwise_mlp",
        {kind: ("channels_last", _dense_mlp(kind)) for kind in ("linear", "conv1x1")},
        lambda rows, taps, width, size: counts.pointwise_mlp(rows, width, 4 * width, size),
        {**_PLAIN, "out_c": 1},
    ),
    OpSpec(
        "downsample",
        "downsample",
        _both_layouts(_dense_downsample),
        lambda rows, taps, width, size: counts.downsample(rows, width, 2 * width, size),
        {"out_c": 2},
        stride=2,
    ),
    OpSpec(
        "block",
        "convnextv2_block",
        {
            f"{layout} {kind}": (layout, _dense_block(kind))
            for layout in ("nchw", "channels_last")
            for kind in ("linear", "conv1x1")
        },
        counts.block,
        {"k": 7, "drop": False, "hidden": None},
    ),
)
