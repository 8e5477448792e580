"""Each op of the library beside the plain PyTorch that masked dense execution uses for it.

What an op is called and which parameters it takes is in the tests' catalogue of op calls, ``conformance/samples.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F
from conformance.samples import SPECS as CALLS
from conformance.samples import Sample, make_sample
from torch import Tensor

from convnextv2_kernels import ops
from convnextv2_kernels.benchmark import counts
from convnextv2_kernels.benchmark.baseline import EPS, channel_norm, masked_grn, masked_mlp
from convnextv2_kernels.benchmark.counts import Work
from convnextv2_kernels.layout import PatchLayout

Params = Mapping[str, Tensor]


class Sites(NamedTuple):
    """Where a peer computes: ``keep [N, H, W, 1]`` of its output, 1 at visible and 0 at hidden sites; ``visible``, the
    (image, row, column) of each visible patch; ``grid`` of patches."""

    keep: Tensor
    visible: tuple[Tensor, Tensor, Tensor]
    grid: tuple[int, int]


# Of an NCHW-shaped map in either memory format, or packed rows; returns an NHWC-shaped map or packed rows.
DenseOp = Callable[[Tensor, Params, Sites], Tensor]

STEM_SIDE = 8
IN_CHANS = 3
MLP = ("w1", "b1", "gamma", "beta", "w2", "b2")
# whether the op takes LayerNorm's parameters
_GATHERS_NORMALIZED = "ln" in CALLS["gathered_pointwise_mlp"].small
_PLAIN = {"residual": False, "drop": False, "hidden": None}


class Rows(NamedTuple):
    """Sites of a call: those of the input that it computes, (site, tap) pairs of a 7x7 kernel, and all of the map."""

    count: int
    taps: int
    whole: int


@dataclass(frozen=True)
class OpSpec:
    """An op, its dense peers, and its counted work.

    Attributes:
        op: its public name.
        dense: name -> (memory layout of the input, function). The layout "packed" is that of packed rows; "visible" is
            channels_last, of which the function reads visible patches alone.
        work: (:class:`Rows`, width, itemsize) -> :class:`Work`.
        axes: of its sample, besides the width.
        factor: input channels as a multiple of the stage's width.
        stride: sites of the input per site of the output, along one side.
        source: what the op takes: "packed" rows, a dense "map", or "images".
    """

    name: str
    op: str
    dense: Mapping[str, tuple[str, DenseOp]]
    work: Callable[[Rows, int, int], Work]
    axes: Mapping[str, Any] = field(default_factory=dict)
    factor: int = 1
    stride: int = 1
    source: str = "packed"

    def fits(self, side: int) -> bool:
        """Whether the op has a place in the stage with patches of this side."""
        return side == STEM_SIDE if self.source == "images" else side >= self.stride

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
    return tensor is not None and name not in ("x", "residual", "images")


@functools.cache
def _constants(op: str) -> frozenset[str]:
    return frozenset(make_sample(op).constants)


def _conv(x: Tensor, p: Params, prefix: str = "") -> Tensor:
    weight = p[f"{prefix}weight"]
    return F.conv2d(x, weight, p[f"{prefix}bias"], padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _dense_conv(x: Tensor, p: Params, at: Sites) -> Tensor:
    return _conv(x, p).permute(0, 2, 3, 1) * at.keep


def _dense_conv_norm(x: Tensor, p: Params, at: Sites) -> Tensor:
    return channel_norm(_conv(x, p), p["ln_weight"], p["ln_bias"]) * at.keep


def _dense_norm(x: Tensor, p: Params, at: Sites) -> Tensor:
    return channel_norm(x, p["weight"], p["bias"])


def _dense_gelu_grn(x: Tensor, p: Params, at: Sites) -> Tensor:
    return masked_grn(F.gelu(x.permute(0, 2, 3, 1)).mul_(at.keep), p["gamma"], p["beta"])


def _dense_mlp(kind: str) -> DenseOp:
    def run(x: Tensor, p: Params, at: Sites) -> Tensor:
        return masked_mlp(x.permute(0, 2, 3, 1), [p[k] for k in MLP], at.keep, kind)

    return run


def _dense_downsample(x: Tensor, p: Params, at: Sites) -> Tensor:
    y = channel_norm(x, p["ln_weight"], p["ln_bias"]).permute(0, 3, 1, 2)
    y = F.conv2d(y, p["weight"], p["bias"], stride=2)
    return y.permute(0, 2, 3, 1) * at.keep


def _dense_block(kind: str) -> DenseOp:
    def run(x: Tensor, p: Params, at: Sites) -> Tensor:
        y = channel_norm(_conv(x, p, "dw_"), p["ln_weight"], p["ln_bias"])
        y = masked_mlp(y, [p[k] for k in MLP], at.keep, kind)
        return (x + y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    return run


def _dense_grn(x: Tensor, p: Params, at: Sites) -> Tensor:
    return masked_grn(x.permute(0, 2, 3, 1), p["gamma"], p["beta"])


def _dense_norm_grn(x: Tensor, p: Params, at: Sites) -> Tensor:
    return masked_grn(channel_norm(x, p["ln_weight"], p["ln_bias"]) * at.keep, p["gamma"], p["beta"])


def _dense_norm_mlp(kind: str) -> DenseOp:
    def run(x: Tensor, p: Params, at: Sites) -> Tensor:
        return masked_mlp(channel_norm(x, p["ln_weight"], p["ln_bias"]), [p[k] for k in MLP], at.keep, kind)

    return run


def _cells(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """An NHWC map as ``[N, Gh, s, Gw, s, C]``, a view where it is contiguous."""
    n, height, width, c = x.shape
    return x.reshape(n, grid[0], height // grid[0], grid[1], width // grid[1], c)


def _gather(x: Tensor, p: Params, at: Sites) -> Tensor:
    image, row, column = at.visible
    return _cells(x.permute(0, 2, 3, 1), at.grid)[image, row, :, column]


def _scatter(x: Tensor, p: Params, at: Sites) -> Tensor:
    image, row, column = at.visible
    whole = x.new_zeros(*at.keep.shape[:3], x.shape[-1])
    _cells(whole, at.grid)[image, row, :, column] = x
    return whole


def _gather_mlp(x: Tensor, p: Params, at: Sites) -> Tensor:
    """In plain PyTorch on packed rows, where every image has the same number."""
    rows = _gather(x, p, at)
    if "ln_weight" in p:
        rows = F.layer_norm(rows, p["ln_weight"].shape, p["ln_weight"], p["ln_bias"], EPS)
    images = rows.reshape(at.keep.shape[0], -1, rows.shape[2], rows.shape[3])
    return masked_mlp(images, [p[k] for k in MLP], None, "linear").reshape(rows.shape)


def _dense_linear(x: Tensor, p: Params, at: Sites) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), p["weight"], p["bias"])


def _dense_stem(x: Tensor, p: Params, at: Sites) -> Tensor:
    y = F.conv2d(x, p["weight"], p["bias"], stride=4)
    if "ln_weight" in p:
        return channel_norm(y, p["ln_weight"], p["ln_bias"]) * at.keep
    return y.permute(0, 2, 3, 1) * at.keep


def _both_layouts(function: DenseOp) -> dict[str, tuple[str, DenseOp]]:
    return {layout: (layout, function) for layout in ("nchw", "channels_last")}


SPECS = (
    OpSpec(
        "depthwise_conv",
        "submanifold_depthwise_conv2d",
        _both_layouts(_dense_conv),
        lambda rows, width, size: counts.depthwise_conv(rows.count, rows.taps, width, itemsize=size),
        {"k": 7},
    ),
    OpSpec(
        "depthwise_conv_layer_norm",
        "depthwise_conv_layer_norm",
        _both_layouts(_dense_conv_norm),
        lambda rows, width, size: counts.depthwise_conv_layer_norm(rows.count, rows.taps, width, itemsize=size),
        {"k": 7},
    ),
    OpSpec(
        "layer_norm",
        "layer_norm",
        {"channels_last": ("channels_last", _dense_norm)},
        lambda rows, width, size: counts.layer_norm(rows.count, width, size),
    ),
    OpSpec(
        "gelu_grn",
        "gelu_grn",
        {"channels_last": ("channels_last", _dense_gelu_grn)},
        lambda rows, width, size: counts.gelu_grn(rows.count, 4 * width, size),
        factor=4,
    ),
    OpSpec(
        "pointwise_mlp",
        "pointwise_mlp",
        {kind: ("channels_last", _dense_mlp(kind)) for kind in ("linear", "conv1x1")},
        lambda rows, width, size: counts.pointwise_mlp(rows.count, width, 4 * width, size),
        {**_PLAIN, "out_c": 1},
    ),
    OpSpec(
        "downsample",
        "downsample",
        _both_layouts(_dense_downsample),
        lambda rows, width, size: counts.downsample(rows.count, width, 2 * width, size),
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
        lambda rows, width, size: counts.block(rows.count, rows.taps, width, size),
        {"k": 7, "drop": False, "hidden": None},
    ),
    OpSpec(
        "global_response_norm",
        "global_response_norm",
        {"channels_last": ("channels_last", _dense_grn)},
        lambda rows, width, size: counts.gelu_grn(rows.count, 4 * width, size),
        factor=4,
    ),
    OpSpec(
        "layer_norm_grn",
        "layer_norm_grn",
        {"channels_last": ("channels_last", _dense_norm_grn)},
        lambda rows, width, size: counts.layer_norm_grn(rows.count, width, size),
    ),
    OpSpec(
        "linear",
        "linear",
        {"channels_last": ("channels_last", _dense_linear)},
        lambda rows, width, size: counts.matrix_product(rows.count, width, 4 * width, size),
        {"out_c": 4},
    ),
    OpSpec(
        "gather_patches",
        "gather_patches",
        {"indexing": ("visible", _gather)},
        lambda rows, width, size: counts.gathered(rows.count, rows.whole, width, size),
        source="map",
    ),
    OpSpec(
        "scatter_patches",
        "scatter_patches",
        {"indexing": ("packed", _scatter)},
        lambda rows, width, size: counts.scattered(rows.count, rows.whole, width, size),
        {"fill": False},
    ),
    OpSpec(
        "gathered_pointwise_mlp",
        "gathered_pointwise_mlp",
        {
            **{kind: ("channels_last", _dense_mlp(kind)) for kind in ("linear", "conv1x1")},
            "gather linear": ("visible", _gather_mlp),
        },
        lambda rows, width, size: counts.gathered_pointwise_mlp(rows.count, rows.whole, width, 4 * width, size),
        {**_PLAIN, "out_c": 1, **({"ln": False} if _GATHERS_NORMALIZED else {})},
        source="map",
    ),
    OpSpec(
        "patch_embed",
        "patch_embed",
        _both_layouts(_dense_stem),
        lambda rows, width, size: counts.patch_embed(rows.count, width, size, IN_CHANS),
        {"in_chans": IN_CHANS},
        source="images",
    ),
    OpSpec(
        "patch_embed_layer_norm",
        "patch_embed_layer_norm",
        _both_layouts(_dense_stem),
        lambda rows, width, size: counts.patch_embed(rows.count, width, size, IN_CHANS, layer_norm=True),
        {"in_chans": IN_CHANS},
        source="images",
    ),
)
if _GATHERS_NORMALIZED:
    SPECS += (
        OpSpec(
            "gathered_layer_norm_mlp",
            "gathered_pointwise_mlp",
            {
                **{kind: ("channels_last", _dense_norm_mlp(kind)) for kind in ("linear", "conv1x1")},
                "gather linear": ("visible", _gather_mlp),
            },
            lambda rows, width, size: counts.gathered_pointwise_mlp(
                rows.count, rows.whole, width, 4 * width, size, layer_norm=True
            ),
            {**_PLAIN, "out_c": 1, "ln": True},
            source="map",
        ),
    )
