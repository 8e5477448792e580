"""Each op of the library beside the plain PyTorch that masked dense execution uses for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from convnextv2_kernels import ops
from convnextv2_kernels.benchmark import counts
from convnextv2_kernels.benchmark.baseline import channel_norm, masked_grn, masked_mlp
from convnextv2_kernels.benchmark.counts import Work
from convnextv2_kernels.layout import PatchLayout

Params = Mapping[str, Tensor]
# Of an NCHW-shaped map in either memory format and keep [N, H, W, 1]; returns an NHWC-shaped map.
DenseOp = Callable[[Tensor, Params, Tensor], Tensor]

CONV = ("weight", "bias")
NORM = ("ln_weight", "ln_bias")
MLP = ("w1", "b1", "gamma", "beta", "w2", "b2")


@dataclass(frozen=True)
class OpSpec:
    """An op, its dense peers, and its counted work.

    Attributes:
        parameters: names, of :func:`parameter_shapes`.
        sparse: packed input, parameters, layout -> packed output.
        dense: name -> (memory layout of the input, function).
        work: (rows, taps, width, itemsize) -> :class:`Work`.
        factor: input channels as a multiple of the stage's width.
        stride: sites of the input per site of the output, along one side.
    """

    name: str
    parameters: tuple[str, ...]
    sparse: Callable[[Tensor, Params, PatchLayout], Tensor]
    dense: Mapping[str, tuple[str, DenseOp]]
    work: Callable[[int, int, int, int], Work]
    factor: int = 1
    stride: int = 1


def parameter_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters the specs name, for a stage of this width."""
    return {
        "weight": (width, 1, 7, 7),
        "bias": (width,),
        "ln_weight": (width,),
        "ln_bias": (width,),
        "w1": (4 * width, width),
        "b1": (4 * width,),
        "gamma": (4 * width,),
        "beta": (4 * width,),
        "w2": (width, 4 * width),
        "b2": (width,),
        "down_weight": (2 * width, width, 2, 2),
        "down_bias": (2 * width,),
    }


def _conv(x: Tensor, p: Params) -> Tensor:
    weight = p["weight"]
    return F.conv2d(x, weight, p["bias"], padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _dense_conv(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return _conv(x, p).permute(0, 2, 3, 1) * keep


def _dense_conv_norm(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return channel_norm(_conv(x, p), p["ln_weight"], p["ln_bias"]) * keep


def _dense_norm(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return channel_norm(x, p["ln_weight"], p["ln_bias"])


def _dense_gelu_grn(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    return masked_grn(F.gelu(x.permute(0, 2, 3, 1)).mul_(keep), p["gamma"], p["beta"])


def _dense_mlp(kind: str) -> DenseOp:
    def run(x: Tensor, p: Params, keep: Tensor) -> Tensor:
        return masked_mlp(x.permute(0, 2, 3, 1), *(p[k] for k in MLP), keep, kind)

    return run


def _dense_downsample(x: Tensor, p: Params, keep: Tensor) -> Tensor:
    y = channel_norm(x, p["ln_weight"], p["ln_bias"]).permute(0, 3, 1, 2)
    y = F.conv2d(y, p["down_weight"], p["down_bias"], stride=2)
    return y.permute(0, 2, 3, 1) * keep


def _dense_block(kind: str) -> DenseOp:
    def run(x: Tensor, p: Params, keep: Tensor) -> Tensor:
        y = channel_norm(_conv(x, p), p["ln_weight"], p["ln_bias"])
        y = masked_mlp(y, *(p[k] for k in MLP), keep, kind)
        return (x + y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    return run


def _both_layouts(function: DenseOp) -> dict[str, tuple[str, DenseOp]]:
    return {layout: (layout, function) for layout in ("nchw", "channels_last")}


SPECS = (
    OpSpec(
        "depthwise_conv",
        CONV,
        lambda x, p, layout: ops.submanifold_depthwise_conv2d(x, p["weight"], p["bias"], layout),
        _both_layouts(_dense_conv),
        lambda rows, taps, width, size: counts.depthwise_conv(rows, taps, width, itemsize=size),
    ),
    OpSpec(
        "depthwise_conv_layer_norm",
        CONV + NORM,
        lambda x, p, layout: ops.depthwise_conv_layer_norm(
            x, p["weight"], p["bias"], p["ln_weight"], p["ln_bias"], layout
        ),
        _both_layouts(_dense_conv_norm),
        lambda rows, taps, width, size: counts.depthwise_conv_layer_norm(rows, taps, width, itemsize=size),
    ),
    OpSpec(
        "layer_norm",
        NORM,
        lambda x, p, layout: ops.layer_norm(x, p["ln_weight"], p["ln_bias"]),
        {"channels_last": ("channels_last", _dense_norm)},
        lambda rows, taps, width, size: counts.layer_norm(rows, width, size),
    ),
    OpSpec(
        "gelu_grn",
        ("gamma", "beta"),
        lambda x, p, layout: ops.gelu_grn(x, p["gamma"], p["beta"], layout),
        {"channels_last": ("channels_last", _dense_gelu_grn)},
        lambda rows, taps, width, size: counts.gelu_grn(rows, 4 * width, size),
        factor=4,
    ),
    OpSpec(
        "pointwise_mlp",
        MLP,
        lambda x, p, layout: ops.pointwise_mlp(x, *(p[k] for k in MLP), layout),
        {kind: ("channels_last", _dense_mlp(kind)) for kind in ("linear", "conv1x1")},
        lambda rows, taps, width, size: counts.pointwise_mlp(rows, width, 4 * width, size),
    ),
    OpSpec(
        "downsample",
        (*NORM, "down_weight", "down_bias"),
        lambda x, p, layout: ops.downsample(x, p["ln_weight"], p["ln_bias"], p["down_weight"], p["down_bias"]),
        _both_layouts(_dense_downsample),
        lambda rows, taps, width, size: counts.downsample(rows, width, 2 * width, size),
        stride=2,
    ),
    OpSpec(
        "block",
        CONV + NORM + MLP,
        lambda x, p, layout: ops.convnextv2_block(x, *(p[k] for k in CONV + NORM + MLP), layout),
        {
            f"{layout} {kind}": (layout, _dense_block(kind))
            for layout in ("nchw", "channels_last")
            for kind in ("linear", "conv1x1")
        },
        counts.block,
    ),
)
