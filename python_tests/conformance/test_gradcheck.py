"""Analytic against numerical gradients in float64: every op and the whole block, on every backend with float64."""

from __future__ import annotations

import pytest
import torch

import convnextv2_kernels as ck

from .backends import BACKENDS, F64, REFERENCE, marks
from .samples import SPECS, make_sample

SMALL = {"pointwise_mlp": {"c": 2, "hidden": 5, "out_c": 3}, "convnextv2_block": {"c": 3, "hidden": 5}}
SMALL["gathered_pointwise_mlp"] = SMALL["pointwise_mlp"] | {"c": 3}
VARIANTS = [
    *((op, SMALL.get(op, {})) for op in SPECS),
    *((op, {"at": ("empty_image", 2 if op == "downsample" else 1)} | SMALL.get(op, {})) for op in SPECS),
    ("scatter_patches", {"fill": False}),
    ("submanifold_depthwise_conv2d", {"at": ("dense_1x5", None), "k": 7, "bias": False}),
    ("submanifold_depthwise_conv2d", {"at": ("one_patch", 8), "c": 1, "k": 7}),
    ("submanifold_depthwise_conv2d", {"at": ("uniform", 1), "c": 1, "k": 5}),
    ("depthwise_conv_layer_norm", {"at": ("one_patch", 3), "c": 2, "k": 7, "bias": False}),
    ("layer_norm", {"affine": "w"}),
    ("layer_norm", {"affine": "b"}),
    ("global_response_norm", {"scope": "batch"}),
    ("global_response_norm", {"at": ("dense_1x5", None)}),
    ("gelu_grn", {"scope": "batch"}),
    ("layer_norm_grn", {"scope": "batch"}),
    ("pointwise_mlp", {**SMALL["pointwise_mlp"], "scope": "batch", "residual": False}),
    ("pointwise_mlp", {**SMALL["pointwise_mlp"], "at": ("dense_1x5", None), "drop": False}),
    ("pointwise_mlp", {**SMALL["pointwise_mlp"], "at": ("uniform", 2)}),
    ("pointwise_mlp", {**SMALL["pointwise_mlp"], "act": "gelu_tanh"}),
    ("gathered_pointwise_mlp", {**SMALL["gathered_pointwise_mlp"], "ln": False, "scope": "batch", "residual": False}),
    ("gathered_pointwise_mlp", {**SMALL["gathered_pointwise_mlp"], "at": ("uniform", 2), "act": "gelu_tanh"}),
    ("pointwise_mlp", {**SMALL["pointwise_mlp"], "layer_scale": True}),
    ("pointwise_mlp", {**SMALL["pointwise_mlp"], "grn": False, "layer_scale": True, "residual": False}),
    ("downsample", {"at": ("ragged", 2), "bias": False}),
    ("convnextv2_block", {**SMALL["convnextv2_block"], "scope": "batch", "bias": False}),
    ("convnextv2_block", {**SMALL["convnextv2_block"], "at": ("dense_1x5", None), "drop": False}),
    ("convnextv2_block", {**SMALL["convnextv2_block"], "grn_eps": 0.5}),
    ("convnextv2_block", {**SMALL["convnextv2_block"], "at": ("uniform", 2), "act": "gelu_tanh", "grn_eps": 0.5}),
    ("convnextv2_block", {"at": ("uniform", 1), "c": 2, "hidden": 5, "k": 5}),
    ("convnextv2_block", {**SMALL["convnextv2_block"], "grn": False, "layer_scale": True}),
    ("convnextv2_block", {**SMALL["convnextv2_block"], "grn": False, "layer_scale": True, "at": ("dense_1x5", None)}),
]


def _cases():
    for backend in (REFERENCE, *BACKENDS):
        if backend.has_float64:
            for op, axes in VARIANTS:
                values = "-".join(str(v) for v in axes.values())
                yield pytest.param(op, axes, backend, id=f"{op}-{values}-{backend.name}", marks=marks(backend))


@pytest.mark.thorough("triton")
@pytest.mark.parametrize(("op", "axes", "backend"), list(_cases()))
def test_gradcheck(op, axes, backend):
    sample = make_sample(op, **axes).cast(F64, backend.device)
    names = [name for name, t in sample.tensors.items() if t is not None]

    def function(*values):
        with ck.use_backend(backend.name):
            return sample._replace(tensors=sample.tensors | dict(zip(names, values, strict=True)))()

    # interpreted kernels take a second a call: a random direction instead of every element
    fast = backend.interpreted
    assert torch.autograd.gradcheck(function, [sample.tensors[name] for name in names], fast_mode=fast)


@pytest.mark.parametrize("op", ["gelu_grn", "convnextv2_block"])
def test_reference_has_higher_derivatives(op):
    """The alternative that the native ops' error message for a double backward names."""
    sample = make_sample(op, at=("empty_image", 1), c=2, **({"hidden": 3} if op == "convnextv2_block" else {})).cast(
        F64
    )
    names = [name for name, t in sample.tensors.items() if t is not None]

    def function(*values):
        with ck.use_backend("reference"):
            return sample._replace(tensors=sample.tensors | dict(zip(names, values, strict=True)))()

    assert torch.autograd.gradgradcheck(function, [sample.tensors[name] for name in names])
