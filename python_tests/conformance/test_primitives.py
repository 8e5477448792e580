"""Each primitive of a backend against its contract, ``backends/reference/mlp.py``, one at a time."""

from __future__ import annotations

import pytest
import torch

from convnextv2_kernels import backends

from .backends import F32, F64, parametrize_backends_and_dtypes
from .layouts import make_layout

H, C = 21, 10
EPS = 1e-6
# what only a backend that folds LayerNorm is asked for
ONLY_FOLDING = ("normalized_backward without weight", "prepare_parameters folding", "unfold_layer_norm")


def segments_of(where: str, rows_per_slot: int = 16):
    layout = make_layout(where)
    offsets = None if layout.patches_per_image is not None else layout.image_offsets
    rows = layout.num_patches * rows_per_slot
    return rows, (offsets, rows_per_slot if offsets is not None else 1, layout.num_images)


def partial_segments():
    """Offsets of a chunk in the middle of a batch: they do not start at zero."""
    offsets = make_layout("ragged").image_offsets[1:]
    return int(offsets[-1] - offsets[0]) * 16, (offsets, 16, 2)


WHOLE_BATCH = (64, (None, 1, 1))
CASES = {
    "uniform": segments_of("uniform"),
    "ragged": segments_of("ragged"),
    "empty_image": segments_of("empty_image"),
    "none_visible": segments_of("none_visible"),
    "batch_0": segments_of("batch_0"),
    "middle": partial_segments(),
    "whole_batch": WHOLE_BATCH,
    "more_rows_than_columns": (300, (None, 1, 2)),
}


def draw(*shape, positive=False):
    t = torch.randn(shape, dtype=F64)
    return t.abs() + 0.1 if positive else t


def calls(rows, segments):
    """``{primitive: arguments}`` in float64."""
    count = segments[2]
    weights = draw(H, C), draw(H), draw(C, H), draw(C), torch.zeros(H, dtype=F64)
    d, norm = draw(rows, C), draw(count, H, positive=True)
    if count:
        norm[0, :3] = 0.0  # channels of zero norm
    return {
        "linear": (draw(rows, C), draw(H, C), draw(H)),
        "linear_input_grad": (draw(rows, H), draw(H, C)),
        "linear_weight_grad": (draw(rows, H), draw(rows, C)),
        "column_sum": (draw(rows, H),),
        "gelu_grn_linear": (draw(rows, H), "gelu", draw(H), draw(H), EPS, draw(C, H), draw(C), None, True, *segments),
        "gelu_grn_linear with residual": (
            draw(rows, H),
            "gelu_tanh",
            draw(H),
            draw(H),
            EPS,
            draw(C, H),
            draw(C),
            draw(rows, C),
            False,
            *segments,
        ),
        "gelu_grn_linear_backward": (
            draw(rows, H),
            "gelu",
            d,
            d.sum(0),
            norm,
            draw(H),
            draw(H),
            EPS,
            draw(C, H),
            True,
            *segments,
        ),
        "gelu_grn_linear_backward may overwrite": (
            draw(rows, H),
            "gelu_tanh",
            d,
            d.sum(0),
            norm,
            draw(H),
            draw(H),
            EPS,
            draw(C, H),
            False,
            *segments,
        ),
        "prepare_parameters folding": (*weights, (draw(C), draw(C)), draw(1)),
        "prepare_parameters of backward": (*weights[:3], None, weights[4], None, draw(1)),
        "unfold_layer_norm": (draw(H, C), (draw(C), draw(C)), draw(H, C), draw(H)),
        "normalized_backward": (draw(rows, C), draw(rows, C), draw(rows, positive=True), draw(C)),
        "normalized_backward without weight": (draw(rows, C), draw(rows, C), draw(rows, positive=True), None),
    }


def with_arguments(k, function, arguments):
    return getattr(k, function)(*arguments)


def with_prepared_parameters(k, function, arguments):
    """The second product, whose bias a backend may change beforehand."""
    a, act, gamma, beta, eps, weight, bias, *rest = arguments
    w1, b1 = weight.t(), weight[0]
    _, _, weight, bias = k.prepare_parameters(w1, b1, weight, bias, beta, None, a)
    return getattr(k, function)(a, act, gamma, beta, eps, weight, bias, *rest)


@pytest.mark.parametrize("case", CASES)
@parametrize_backends_and_dtypes((F64, F32))
def test_primitives_keep_the_contract(backend, dtype, case):
    rows, segments = CASES[case]
    native, contract = backends.primitives(backend.name), backends.primitives("reference")

    def prepare(value):
        if torch.is_tensor(value):
            return value.to(backend.device, dtype if value.is_floating_point() else value.dtype, copy=True)
        return type(value)(map(prepare, value)) if isinstance(value, (list, tuple)) else value

    for name, arguments in calls(rows, segments).items():
        function = name.split()[0]
        if name in ONLY_FOLDING and not native.FOLDS_LAYER_NORM:
            continue
        call = with_prepared_parameters if function == "gelu_grn_linear" else with_arguments
        expected = call(contract, function, [a.clone() if torch.is_tensor(a) else a for a in arguments])
        got = call(native, function, prepare(arguments))
        expected, got = ([t] if torch.is_tensor(t) else t for t in (expected, got))
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


def test_every_primitive_of_the_contract_is_here():
    contract = backends.primitives("reference")
    defined = {
        name
        for name, value in vars(contract).items()
        if callable(value) and not name.startswith("_") and value.__module__ == contract.__name__
    }
    assert {name.split()[0] for name in calls(*WHOLE_BATCH)} == defined - {"fused_forward", "fused_backward"}
