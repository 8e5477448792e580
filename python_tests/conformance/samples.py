"""Inputs for every public op: shapes by name, float64 tensors, and how to run an op forward and backward."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout

from .layouts import DENSE_SIZES, make_layout

# what has a value per pixel; every other tensor is a parameter, whose gradient is a sum over rows
FEATURES = ("x", "residual", "images")


class Sample(NamedTuple):
    """A call of ``ops.<op>``: differentiable float64 tensors (or None), and everything else."""

    op: str
    tensors: dict[str, Tensor | None]
    constants: dict[str, Any]

    @property
    def rows(self) -> int:
        """Terms in the sum of a parameter gradient."""
        x = self.tensors.get("x", self.tensors.get("images"))
        return max(1, x.numel() // max(1, x.shape[-1]))

    def rounded(self, dtype: torch.dtype) -> Sample:
        """The same call with values that ``dtype`` can hold, in float64."""
        tensors = {k: None if t is None else t.to(dtype).double() for k, t in self.tensors.items()}
        return self._replace(tensors=tensors)

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> Sample:
        """Fresh leaves of ``dtype`` on ``device`` that require grad."""

        def leaf(t):
            return None if t is None else t.detach().to(device, dtype, copy=True).requires_grad_()

        def move(value):
            if isinstance(value, PatchLayout):
                return value if value.device.type == device else value.to(device)
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(device, dtype)
            return value

        tensors = {k: leaf(t) for k, t in self.tensors.items()}
        return self._replace(tensors=tensors, constants={k: move(v) for k, v in self.constants.items()})

    def __call__(self) -> Tensor:
        return getattr(ck.ops, self.op)(**self.tensors, **self.constants)

    def run(self, backend: str, cotangent: Tensor | None = None) -> dict[str, Tensor]:
        """``{"out": ..., "x": its gradient, ...}``; without a cotangent the output alone."""
        with ck.use_backend(backend):
            out = self()
        results = {"out": out.detach()}
        if cotangent is not None:
            wanted = {k: t for k, t in self.tensors.items() if t is not None}
            grads = torch.autograd.grad(out, list(wanted.values()), cotangent.to(out))
            results.update(zip(wanted, grads, strict=True))
        return results


def cotangent_of(out: Tensor, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Random float64 cotangent whose values ``dtype`` can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).double()


class Numbers:
    """Random float64 tensors of one sample, in the ranges a trained network has."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + mean

    def features(self, where: str, s: int, c: int, batch: int = 2) -> tuple[Tensor, PatchLayout | None]:
        """Packed rows of a named layout, or a dense map of a named size."""
        if where in DENSE_SIZES:
            return self.normal(batch, *DENSE_SIZES[where], c), None
        layout = make_layout(where)
        return self.normal(layout.num_patches, s, s, c), layout

    def dense(self, where: str, s: int, c: int) -> tuple[Tensor, PatchLayout]:
        """A dense map that a named layout packs."""
        layout = make_layout(where)
        gh, gw = layout.grid
        return self.normal(layout.num_images, gh * s, gw * s, c), layout

    def conv(self, c: int, k: int, bias: bool, prefix: str = "") -> dict[str, Tensor | None]:
        weight = self.normal(c, 1, k, k, scale=1 / k)
        return {f"{prefix}weight": weight, f"{prefix}bias": self.normal(c) if bias else None}

    def norm(self, c: int) -> dict[str, Tensor]:
        return {"ln_weight": self.normal(c, scale=0.3, mean=1.0), "ln_bias": self.normal(c, scale=0.3)}

    def grn(self, c: int) -> dict[str, Tensor]:
        return {"gamma": self.normal(c, scale=0.5), "beta": self.normal(c, scale=0.5)}

    def mlp(self, c: int, hidden: int, out_c: int) -> dict[str, Tensor]:
        first = {"w1": self.normal(hidden, c, scale=c**-0.5), "b1": self.normal(hidden, scale=0.3)}
        last = {"w2": self.normal(out_c, hidden, scale=hidden**-0.5), "b2": self.normal(out_c, scale=0.3)}
        # the official spelling of GRN's parameters, [1, 1, 1, H]
        return first | {k: t.view(1, 1, 1, -1) for k, t in self.grn(hidden).items()} | last

    def v1(self, tensors: dict, out_c: int, grn: bool, layer_scale: bool) -> dict[str, Tensor | None]:
        """The tensors of an MLP without GRN, or with layer scale, as asked for."""
        tensors = tensors if grn else tensors | {"gamma": None, "beta": None}
        return tensors | {"layer_scale": self.normal(out_c, scale=0.3)} if layer_scale else tensors

    def drop_path(self, images: int) -> Tensor:
        """A dropped image and kept ones; the factors are exact in every dtype."""
        return torch.tensor([0.0, 1.25, 1.5], dtype=torch.float64).repeat(images)[:images]


def _images(x: Tensor, layout: PatchLayout | None) -> int:
    return x.shape[0] if layout is None else layout.num_images


def _gather(d, at, c):
    x, layout = d.dense(*at, c)
    return {"x": x}, {"layout": layout}


def _scatter(d, at, c, fill):
    x, layout = d.features(*at, c)
    return {"x": x, "fill": d.normal(c) if fill else None}, {"layout": layout}


def _conv(d, at, c, k, bias):
    x, layout = d.features(*at, c)
    return {"x": x, **d.conv(c, k, bias)}, {"layout": layout}


def _conv_norm(d, at, c, k, bias):
    x, layout = d.features(*at, c)
    return {"x": x, **d.conv(c, k, bias), **d.norm(c)}, {"layout": layout}


def _layer_norm(d, at, c, affine):
    x, _ = d.features(*at, c)
    weight, bias = d.norm(c).values()
    return {"x": x, "weight": weight if "w" in affine else None, "bias": bias if "b" in affine else None}, {}


def _grn(d, at, c, scope):
    x, layout = d.features(*at, c)
    return {"x": x, **d.grn(c)}, {"layout": layout, "scope": scope}


def _norm_grn(d, at, c, scope):
    x, layout = d.features(*at, c)
    return {"x": x, **d.norm(c), **d.grn(c)}, {"layout": layout, "scope": scope}


def _mlp(d, at, c, hidden, out_c, residual, drop, scope, act="gelu", gathered=False, grn=True, layer_scale=False):
    x, layout = d.dense(*at, c) if gathered else d.features(*at, c)
    shape = (layout.num_patches, at[1], at[1]) if gathered else x.shape[:-1]
    hidden, out_c = hidden or 4 * c, out_c or c
    tensors = {"x": x, **d.mlp(c, hidden, out_c), "residual": d.normal(*shape, out_c) if residual else None}
    tensors = d.v1(tensors, out_c, grn, layer_scale)
    scale = d.drop_path(_images(x, layout)) if drop else None
    return tensors, {"layout": layout, "drop_path_scale": scale, "scope": scope, "act": act}


def _gathered_mlp(d, ln, **axes):
    tensors, constants = _mlp(d, **axes, gathered=True)
    return tensors | (d.norm(axes["c"]) if ln else {"ln_weight": None, "ln_bias": None}), constants


def _patch_embed(d, at, c, in_chans, bias):
    where, s = at
    if where in DENSE_SIZES:
        images, layout = d.normal(2, in_chans, *(4 * side for side in DENSE_SIZES[where])), None
    else:
        layout = make_layout(where)
        images = d.normal(layout.num_images, in_chans, *(4 * s * side for side in layout.grid))
    weight = d.normal(c, in_chans, 4, 4, scale=(16 * in_chans) ** -0.5)
    return {"images": images, "weight": weight, "bias": d.normal(c) if bias else None}, {"layout": layout}


def _stem(d, at, c, in_chans, bias):
    tensors, constants = _patch_embed(d, at, c, in_chans, bias)
    return tensors | d.norm(c), constants


def _downsample(d, at, c, out_c, bias):
    if at[0] in DENSE_SIZES:  # even sides
        h, w = DENSE_SIZES[at[0]]
        x = d.normal(2, h + h % 2, w + w % 2, c)
    else:
        x, _ = d.features(*at, c)
    weight = d.normal(out_c, c, 2, 2, scale=(4 * c) ** -0.5)
    return {"x": x, **d.norm(c), "weight": weight, "bias": d.normal(out_c) if bias else None}, {}


def _linear(d, at, c, out_c, bias):
    x, _ = d.features(*at, c)
    return {"x": x, "weight": d.normal(out_c, c, scale=c**-0.5), "bias": d.normal(out_c) if bias else None}, {}


def _block(d, at, c, hidden, k, bias, drop, scope, act="gelu", grn_eps=None, grn=True, layer_scale=False):
    x, layout = d.features(*at, c)
    tensors = {"x": x, **d.conv(c, k, bias, "dw_"), **d.norm(c), **d.mlp(c, hidden or 4 * c, c)}
    tensors = d.v1(tensors, c, grn, layer_scale)
    scale = d.drop_path(_images(x, layout)) if drop else None
    return tensors, {"layout": layout, "drop_path_scale": scale, "scope": scope, "act": act, "grn_eps": grn_eps}


class OpSpec(NamedTuple):
    """How to make a sample of an op, and the values a small one has for each of its axes without a default."""

    make: Callable
    small: dict[str, Any]


_AT = ("ragged", 2)
_CONV = {"at": _AT, "c": 5, "k": 3, "bias": True}
_GRN = {"at": _AT, "c": 5, "scope": "image"}
_MLP = {"at": _AT, "c": 3, "hidden": 7, "out_c": 3, "residual": True, "drop": True, "scope": "image"}
SPECS = {
    "gather_patches": OpSpec(_gather, {"at": _AT, "c": 5}),
    "scatter_patches": OpSpec(_scatter, {"at": _AT, "c": 5, "fill": True}),
    "submanifold_depthwise_conv2d": OpSpec(_conv, _CONV),
    "depthwise_conv_layer_norm": OpSpec(_conv_norm, _CONV),
    "layer_norm": OpSpec(_layer_norm, {"at": _AT, "c": 5, "affine": "wb"}),
    "global_response_norm": OpSpec(_grn, _GRN),
    "gelu_grn": OpSpec(_grn, _GRN),
    "layer_norm_grn": OpSpec(_norm_grn, _GRN),
    "pointwise_mlp": OpSpec(_mlp, _MLP),
    "gathered_pointwise_mlp": OpSpec(_gathered_mlp, {**_MLP, "ln": True}),
    "patch_embed": OpSpec(_patch_embed, {"at": ("ragged", 1), "c": 5, "in_chans": 2, "bias": True}),
    "patch_embed_layer_norm": OpSpec(_stem, {"at": ("ragged", 1), "c": 5, "in_chans": 2, "bias": True}),
    "downsample": OpSpec(_downsample, {"at": _AT, "c": 3, "out_c": 5, "bias": True}),
    "linear": OpSpec(_linear, {"at": _AT, "c": 5, "out_c": 7, "bias": True}),
    "convnextv2_block": OpSpec(
        _block, {"at": _AT, "c": 3, "hidden": 7, "k": 3, "bias": True, "drop": True, "scope": "image"}
    ),
}


def make_sample(op: str, **axes) -> Sample:
    """A sample of ``op``; axes that are not given have their small value. The same axes give the same numbers."""
    spec = SPECS[op]
    axes = spec.small | axes
    seed = zlib.crc32(repr((op, sorted(axes.items()))).encode())
    return Sample(op, *spec.make(Numbers(seed), **axes))
