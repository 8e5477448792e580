"""Values and every gradient of every op, on every backend, dtype and kind of layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convnextv2_kernels import PatchLayout, ops

from .backends import BACKENDS, BF16, F16, F32, F64, dtype_name, marks, parametrize_backends
from .covering import pairwise
from .layouts import LAYOUTS
from .samples import SPECS, Numbers, Sample, make_sample
from .tolerance import ROUNDINGS, check

DTYPES = (F32, F64, BF16, F16)

PACKED = [
    *(("uniform", s) for s in (8, 4, 2, 1, 3)),
    *(("ragged", s) for s in (8, 4, 2, 1, 3)),
    *(("empty_image", s) for s in (4, 2)),
    *(("none_visible", s) for s in (8, 1)),
    *(("all_visible", s) for s in (4, 2)),
    *(("one_patch", s) for s in (8, 1)),
    *(("one_cell", s) for s in (16, 1)),
    *(("non_square", s) for s in (4, 1)),
    *(("batch_0", s) for s in (8, 2)),
]
DENSE = [(name, None) for name in ("dense_7x7", "dense_14x9", "dense_1x5")]
BIG = [("dense_28x30", None), ("all_visible", 16)]
assert {where for where, _ in PACKED} == set(LAYOUTS)

YES_NO = (True, False)
WIDTHS = (1, 5, 17, 40, 96)
SCOPES = ("image", "batch")
ACTS = ("gelu", "gelu_tanh")
_CONV = {"at": PACKED + DENSE + BIG, "c": WIDTHS, "k": (7, 3, 5, 9, 11), "bias": YES_NO}
_GRN = {"at": PACKED + DENSE + BIG, "c": WIDTHS, "scope": SCOPES}
_MLP = {
    "at": PACKED + DENSE,
    "c": (1, 5, 17, 24),
    "hidden": (None, 13),
    "out_c": (None, 9),
    "residual": YES_NO,
    "drop": YES_NO,
    "scope": SCOPES,
    "act": ACTS,
}
# ConvNeXt V1's half of a block: no GRN, layer scale
_V1 = {"grn": YES_NO, "layer_scale": (False, True)}
_STEM = {"at": PACKED + DENSE, "c": (1, 5, 40), "in_chans": (3, 1, 4), "bias": YES_NO}
AXES = {
    "gather_patches": {"at": PACKED, "c": WIDTHS},
    "scatter_patches": {"at": PACKED, "c": WIDTHS, "fill": YES_NO},
    "submanifold_depthwise_conv2d": _CONV,
    "depthwise_conv_layer_norm": _CONV,
    "layer_norm": {"at": PACKED + DENSE + BIG, "c": WIDTHS, "affine": ("wb", "w", "b", "")},
    "global_response_norm": _GRN,
    "gelu_grn": _GRN,
    "layer_norm_grn": _GRN,
    "pointwise_mlp": {**_MLP, **_V1},
    "gathered_pointwise_mlp": {**_MLP, "at": PACKED, "ln": YES_NO},
    "patch_embed": _STEM,
    "patch_embed_layer_norm": _STEM,
    "downsample": {
        "at": [at for at in PACKED if at[1] % 2 == 0] + DENSE,
        "c": (1, 5, 17, 40),
        "out_c": (10, 1, 34),
        "bias": YES_NO,
    },
    "linear": {"at": PACKED + DENSE, "c": (1, 5, 40), "out_c": (10, 1, 34), "bias": YES_NO},
    "convnextv2_block": {
        "at": PACKED + DENSE,
        "c": (1, 5, 17, 24),
        "hidden": (None, 13),
        "k": (7, 3, 5, 9, 11),
        "bias": YES_NO,
        "drop": YES_NO,
        "scope": SCOPES,
        "act": ACTS,
        "grn_eps": (None, 0.5),
        **_V1,
    },
}

# widths past every vector loop and span, and a hidden layer wider than a chunk of one image
WIDE = {
    "submanifold_depthwise_conv2d": [
        {"c": 320, "k": 7, "at": at} for at in (("uniform", 8), ("ragged", 2), ("ragged", 1))
    ],
    "depthwise_conv_layer_norm": [{"c": 320, "k": 7, "at": ("ragged", 4)}],
    "layer_norm": [{"c": 2000, "at": ("uniform", 2)}],
    "gelu_grn": [{"c": 1280, "at": ("ragged", 2)}],
    "layer_norm_grn": [{"c": 320, "at": ("uniform", 4)}, {"c": 2816, "at": ("ragged", 1)}],
    "downsample": [{"c": 192, "out_c": 384, "at": ("ragged", 2)}],
    "patch_embed": [{"c": 320, "in_chans": 3, "at": ("uniform", 8)}],
    "convnextv2_block": [
        {"c": 320, "hidden": None, "k": 7, "at": ("ragged", 1)},
        {"c": 96, "hidden": None, "k": 7, "at": ("uniform", 8)},
        {"c": 80, "hidden": None, "k": 7, "at": ("dense_14x9", None)},
    ],
}


# What a backend whose kernels are interpreted has of the axes: each kind of layout and each path of the kernels once.
SHORT = {
    "at": [
        ("uniform", 8),
        ("ragged", 4),
        ("ragged", 3),
        ("empty_image", 2),
        ("non_square", 1),
        ("none_visible", 1),
        ("batch_0", 2),
        ("dense_7x7", None),
        ("dense_1x5", None),
        ("dense_28x30", None),
    ],
    "c": (1, 5, 24, 40),
    "k": (7, 3, 11),
}


def _cases():
    for backend in BACKENDS:
        for op, axes in AXES.items():
            if backend.interpreted:
                axes = {axis: [v for v in values if v in SHORT.get(axis, values)] for axis, values in axes.items()}
            cases = pairwise({**axes, "dtype": [d for d in DTYPES if not backend.interpreted or d in backend.dtypes]})
            wide = WIDE.get(op, ())[: 1 if backend.interpreted else None]
            wide = [{**case, "dtype": dtype} for case in wide for dtype in (F32, BF16)]
            for case in cases + wide:
                slow = (pytest.mark.thorough,) if backend.interpreted and case in wide else ()
                dtype = case.pop("dtype")
                if dtype == F64 and case["c"] == 1 and _normalises(op) and case.get("ln", True):
                    continue  # the exact gradient is zero, and the truth is rounding noise: see test_extremes.py
                if dtype in backend.dtypes:
                    name = _name(op, case, backend, dtype)
                    yield pytest.param(op, case, backend, dtype, id=name, marks=(*marks(backend), *slow))


def _normalises(op) -> bool:
    return op == "layer_norm" or "ln_weight" in make_sample(op).tensors


def _name(op, case, backend, dtype) -> str:
    where, s = case["at"]
    parts = [where if s is None else f"{where}-s{s}"]
    parts += [f"{axis}={value}" for axis, value in case.items() if axis != "at"]
    return "-".join([op, *parts, dtype_name(dtype), backend.name])


@pytest.mark.parametrize(("op", "case", "backend", "dtype"), list(_cases()))
def test_values_and_gradients(op, case, backend, dtype):
    check(make_sample(op, **case), backend.name, dtype, backend.device)


# one channel, where LayerNorm's output is constant and everything cancels, is in the covering set
CHANNELS = st.integers(5, 36)
EXAMPLES = 4 if any(backend.interpreted for backend in BACKENDS) else 25
KERNELS = st.sampled_from((3, 5, 7, 9, 11))


@st.composite
def _masks(draw):
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)))
    return torch.from_numpy(draw(arrays(bool, shape)))


@settings(max_examples=EXAMPLES)
@given(mask=_masks(), s=st.integers(1, 9), c=CHANNELS, k=KERNELS, scope=st.sampled_from(SCOPES))
@parametrize_backends()
def test_the_block_of_any_mask_and_shape(backend, mask, s, c, k, scope):
    layout, numbers = PatchLayout.from_mask(mask), Numbers(0)
    x = numbers.normal(layout.num_patches, s, s, c)
    tensors = {"x": x, **numbers.conv(c, k, True, "dw_"), **numbers.norm(c), **numbers.mlp(c, 2 * c, c)}
    check(Sample("convnextv2_block", tensors, {"layout": layout, "scope": scope}), backend.name, F32, backend.device)


@pytest.mark.thorough("triton")
@settings(max_examples=EXAMPLES)
@given(shape=st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 20)), c=CHANNELS, k=KERNELS)
@parametrize_backends()
def test_the_block_of_dense_maps_of_any_shape(backend, shape, c, k):
    numbers = Numbers(0)
    tensors = {"x": numbers.normal(*shape, c), **numbers.conv(c, k, True, "dw_"), **numbers.norm(c)}
    sample = Sample("convnextv2_block", tensors | numbers.mlp(c, 2 * c, c), {"layout": None})
    check(sample, backend.name, F32, backend.device)


def test_every_op_has_samples():
    assert set(AXES) == set(SPECS) == set(ROUNDINGS) == set(ops.__all__)
