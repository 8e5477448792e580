"""Each method of a backend against its contract, ``backends/base.py``, as plain formulas."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers.plain_backend import PlainBackend

from convnextv2_kernels import backends
from convnextv2_kernels.backends.base import KernelBackend
from convnextv2_kernels.params import MLPGradRows, MLPOptions, MLPParams, MLPRows, NormParams, Segments

from .backends import F32, F64, parametrize_backends_and_dtypes
from .layouts import make_layout

H, C = 21, 10
EPS = 1e-6
# called on a backend that folds LayerNorm only
ONLY_FOLDING = ("normalized_backward without weight", "prepare_mlp folding", "unfold_layer_norm")
# operators of csrc and Triton, which have conformance samples of their own, and methods without a plain formula here
ELSEWHERE = {
    "depthwise_conv_backward_weight",
    "depthwise_conv_forward",
    "depthwise_conv_normalize",
    "gather_normalize",
    "gather_patches",
    "gathered_rows",
    "grn_backward",
    "grn_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "layer_norm_grn_backward",
    "layer_norm_grn_forward",
    "normalized_backward_put",
    "patch_pixels",
    "put_patches",
    "scaled_weight_grad",
    "scatter_patches",
    "space_to_depth_normalize",
    "space_to_depth_normalize_backward",
    "unsupported_reason",
}


def segments_of(where: str, rows_per_slot: int = 16):
    layout = make_layout(where)
    offsets = None if layout.patches_per_image is not None else layout.image_offsets
    rows = layout.num_patches * rows_per_slot
    return rows, Segments(offsets, rows_per_slot if offsets is not None else 1, layout.num_images)


def partial_segments():
    """Offsets of a chunk in the middle of a batch: they do not start at zero."""
    offsets = make_layout("ragged").image_offsets[1:]
    return int(offsets[-1] - offsets[0]) * 16, Segments(offsets, 16, 2)


ONE_IMAGE = (64, Segments(None, 1, 1))
CASES = {
    "uniform": segments_of("uniform"),
    "ragged": segments_of("ragged"),
    "empty_image": segments_of("empty_image"),
    "none_visible": segments_of("none_visible"),
    "batch_0": segments_of("batch_0"),
    "middle": partial_segments(),
    "one_image": ONE_IMAGE,
    "more_rows_than_columns": (300, Segments(None, 1, 2)),
}


def draw(*shape, positive=False):
    t = torch.randn(shape, dtype=F64)
    return t.abs() + 0.1 if positive else t


def calls(rows: int, segments: Segments) -> dict[str, tuple]:
    """``{method: arguments}`` in float64; a word behind a name tells two calls of it apart."""
    count = segments.count
    options = MLPOptions("gelu", EPS, False, "inputs", F64)
    tanh = options._replace(act="gelu_tanh")
    weights = MLPParams(draw(H, C), draw(H), draw(H), draw(H), draw(C, H), draw(C))
    d, norm = draw(rows, C), draw(count, H, positive=True)
    if count:
        norm[0, :3] = 0.0  # channels of zero norm
    scales = draw(count, H), draw(count, H)
    chunk = MLPGradRows(draw(rows, H), d, d.sum(0), norm, None, None, None, segments, True)
    z, rstd, ln_weight = draw(rows, C), draw(rows, positive=True), draw(C)
    x = draw(rows, C)
    batch = MLPRows(x, draw(rows, C), draw(count), segments, F64)
    return {
        "linear": (x, draw(H, C), draw(H)),
        "linear_input_grad": (draw(rows, H), draw(H, C)),
        "linear_weight_grad": (draw(rows, H), x),
        "column_sum": (draw(rows, H),),
        "gelu_statistics": (draw(rows, H), None, draw(H), segments, options),
        "gelu_scale": (draw(rows, H), draw(rows, H), scales[0], segments, "gelu"),
        "gelu_scale without scale": (draw(rows, H), draw(rows, H), None, segments, "gelu_tanh"),
        "mlp_backward_statistics": (draw(rows, H), draw(rows, H), None, norm, draw(H), segments, options),
        "mlp_backward_statistics of t": (None, None, draw(count, H), norm, draw(H), segments, tanh),
        "mlp_backward_pointwise": (
            draw(rows, H),
            draw(rows, H),
            scales,
            draw(rows, H),
            draw(rows, H),
            segments,
            "gelu",
        ),
        "gelu_grn_linear": (draw(rows, H), weights, None, segments, options, True),
        "gelu_grn_linear with residual": (draw(rows, H), weights, draw(rows, C), segments, tanh, False),
        "gelu_grn_linear_backward": (chunk, weights, options),
        "gelu_grn_linear_backward may overwrite": (chunk._replace(preserve_a=False), weights, tanh),
        "mlp_forward": (batch, weights, options),
        "mlp_forward saving": (batch._replace(drop_path_scale=None), weights, tanh._replace(save="hidden")),
        "mlp_backward": (chunk, weights, options),
        "mlp_backward with LayerNorm": (chunk._replace(z=z, rstd=rstd, ln_weight=ln_weight), weights, tanh),
        "prepare_mlp folding": (
            weights._replace(beta=torch.zeros(H, dtype=F64)),
            NormParams(draw(C), draw(C)),
            draw(1),
        ),
        "prepare_mlp of backward": (weights._replace(b2=None), None, draw(1)),
        "unfold_layer_norm": (draw(H, C), NormParams(draw(C), draw(C)), draw(H, C), draw(H)),
        "normalized_backward": (draw(rows, C), z, rstd, ln_weight),
        "normalized_backward without weight": (draw(rows, C), z, rstd, None),
        "gemms_reduce": (draw(count, C, H), draw(C, H)),
        "gemms_weight": (draw(count, C, H), scales[0], draw(C), draw(H)),
    }


# a backend may change the weights of these beforehand, as it does in the schedule
PREPARED = ("gelu_grn_linear", "mlp_forward")


def call(backend: KernelBackend, function: str, arguments: list) -> list:
    """All that a call computes: its results, and the tensors it writes to."""
    if function in PREPARED:
        like = arguments[0].x if function == "mlp_forward" else arguments[0]
        arguments[1] = backend.prepare_mlp(arguments[1], None, like)
    result = getattr(backend, function)(*arguments)
    if function == "prepare_mlp":
        result = (result.w1, result.b1, result.w2, result.b2)
    written = {"gelu_scale": (1,), "mlp_backward_pointwise": (3, 4)}.get(function, ())
    results = [result] if torch.is_tensor(result) else list(result or ())
    return results + [arguments[i] for i in written]


@pytest.mark.parametrize("case", CASES)
@parametrize_backends_and_dtypes((F64, F32))
def test_primitives_keep_the_contract(backend, dtype, case):
    rows, segments = CASES[case]
    native, contract = backends.get(backend.name), PlainBackend()

    def prepare(value, dtype, device):
        if torch.is_tensor(value):
            return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
        if isinstance(value, tuple):
            parts = [prepare(part, dtype, device) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return dtype if isinstance(value, torch.dtype) else value

    for name, arguments in calls(rows, segments).items():
        function = name.split()[0]
        if name in ONLY_FOLDING and not native.folds_layer_norm:
            continue
        if name == "mlp_backward with LayerNorm" and native.folds_layer_norm:
            arguments = (arguments[0]._replace(ln_weight=None), *arguments[1:])
        expected = call(contract, function, [prepare(a, F64, "cpu") for a in arguments])
        got = call(native, function, [prepare(a, dtype, backend.device) for a in arguments])
        for g, e in zip(got, expected, strict=True):
            if e is None:
                assert g is None, f"{name}: expected None, got a tensor"
                continue
            assert g.shape == e.shape and g.dtype == dtype, f"{name}: {list(g.shape)} of {g.dtype}"
            if e.numel():
                # sums of up to 300 terms of size one
                bound = 64 * torch.finfo(dtype).eps * max(1.0, float(e.abs().max()))
                error = float((g.double().cpu() - e).abs().max())
                assert error <= bound, f"{name} is off by {error:.3e}, more than {bound:.3e}"


def test_every_method_of_the_contract_is_here():
    defined = {name for name, _ in inspect.getmembers(KernelBackend, inspect.isfunction) if not name.startswith("_")}
    assert {name.split()[0] for name in calls(*ONE_IMAGE)} == defined - ELSEWHERE
