"""The reference backend, the truth for all others, against loops over pixels that share no code with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout, ops

from . import brute_force
from .layouts import LAYOUTS
from .samples import SPECS, Sample, make_sample

TOLERANCE = 1e-12  # both sides are float64 sums of at most a few hundred terms of size one


def compare(sample: Sample, mask: np.ndarray | None) -> None:
    arguments = {name: None if t is None else t.numpy() for name, t in sample.tensors.items()}
    for name, value in sample.constants.items():
        if name == "layout":
            arguments["mask"] = mask
        else:
            arguments[name] = value.numpy() if isinstance(value, torch.Tensor) else value
    expected = getattr(brute_force, sample.op)(**arguments)
    got = sample.run("reference")["out"].numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def mask_of(sample: Sample) -> np.ndarray | None:
    layout = sample.constants.get("layout")
    return None if layout is None else layout.hidden_mask().numpy()


PACKED_ONLY = ("gather_patches", "scatter_patches", "gathered_pointwise_mlp")
PLACES = [(op, where) for op in SPECS for where in LAYOUTS]
PLACES += [(op, where) for op in SPECS if op not in PACKED_ONLY for where in ("dense_7x7", "dense_1x5")]


@pytest.mark.parametrize(("op", "where"), PLACES)
def test_reference_equals_brute_force(op, where):
    sample = make_sample(op, at=(where, SPECS[op].small["at"][1]))
    compare(sample, mask_of(sample))


VARIANTS = [
    ("submanifold_depthwise_conv2d", {"k": 7, "at": ("ragged", 1)}),
    ("submanifold_depthwise_conv2d", {"k": 9, "at": ("empty_image", 2), "bias": False}),
    ("submanifold_depthwise_conv2d", {"k": 5, "at": ("non_square", 3)}),
    ("depthwise_conv_layer_norm", {"k": 11, "at": ("ragged", 4), "bias": False}),
    ("scatter_patches", {"fill": False}),
    ("layer_norm", {"affine": ""}),
    ("global_response_norm", {"scope": "batch"}),
    ("gelu_grn", {"scope": "batch", "at": ("empty_image", 2)}),
    ("layer_norm_grn", {"scope": "batch"}),
    ("pointwise_mlp", {"scope": "batch", "residual": False, "out_c": 5}),
    ("pointwise_mlp", {"drop": False}),
    ("pointwise_mlp", {"act": "gelu_tanh"}),
    ("pointwise_mlp", {"grn": False, "layer_scale": True, "out_c": 5}),
    ("pointwise_mlp", {"layer_scale": True, "residual": False}),
    ("gathered_pointwise_mlp", {"act": "gelu_tanh"}),
    ("gathered_pointwise_mlp", {"ln": False, "at": ("non_square", 2)}),
    ("patch_embed", {"at": ("ragged", 2), "bias": False}),
    ("downsample", {"bias": False, "at": ("ragged", 4)}),
    ("linear", {"bias": False}),
    ("convnextv2_block", {"act": "gelu_tanh", "grn_eps": 0.5}),
    ("convnextv2_block", {"grn": False, "layer_scale": True}),
    ("convnextv2_block", {"grn": False, "drop": False, "at": ("dense_7x7", None)}),
    ("convnextv2_block", {"scope": "batch", "drop": False, "bias": False, "k": 7, "at": ("non_square", 4)}),
]


@pytest.mark.parametrize(("op", "axes"), VARIANTS)
def test_variants_equal_brute_force(op, axes):
    sample = make_sample(op, **axes)
    compare(sample, mask_of(sample))


@st.composite
def masks(draw):
    shape = draw(st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 3)))
    return draw(arrays(bool, shape))


@settings(max_examples=25)
@given(mask=masks(), s=st.integers(1, 4), k=st.sampled_from([3, 5, 7, 9, 11]))
def test_convolution_of_any_mask_equals_brute_force(mask, s, k):
    layout = PatchLayout.from_mask(torch.from_numpy(mask))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {"x": draw(layout.num_patches, s, s, 2), "weight": draw(2, 1, k, k), "bias": draw(2)}
    compare(Sample("submanifold_depthwise_conv2d", tensors, {"layout": layout}), mask)


@settings(max_examples=25)
@given(mask=masks(), s=st.integers(1, 3))
def test_gather_is_the_inverse_of_scatter(mask, s):
    layout = PatchLayout.from_mask(torch.from_numpy(mask))
    x = torch.randn(layout.num_patches, s, s, 3)
    with ck.use_backend("reference"):
        assert torch.equal(ops.gather_patches(ops.scatter_patches(x, layout), layout), x)


def test_every_op_has_a_brute_force_twin():
    assert all(callable(getattr(brute_force, op, None)) for op in ops.__all__)
