"""Values at the edge: channels of zero norm, sums of squares past the range of half precision, tiny numbers."""

from __future__ import annotations

import pytest
import torch

import convnextv2_kernels as ck

from .backends import BF16, F16, F32, F64, parametrize_backends, parametrize_backends_and_dtypes
from .layouts import make_layout
from .samples import SPECS, Sample, cotangent_of, make_sample
from .tolerance import check

WITH_GRN = ("global_response_norm", "gelu_grn", "layer_norm_grn", "pointwise_mlp", "convnextv2_block")
DTYPES = (F32, F64, BF16)


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("op", ("global_response_norm", "gelu_grn"))
@parametrize_backends_and_dtypes(DTYPES)
def test_channels_of_zero_norm(backend, op, scope, dtype):
    """They pass unscaled, with the gradient of the identity; other channels are unaffected."""
    sample = make_sample(op, c=6, scope=scope, at=("ragged", 4))
    sample.tensors["x"][..., 2:4] = 0.0
    check(sample, backend.name, dtype, backend.device)
    exact = sample.cast(dtype, backend.device)
    out = exact.run(backend.name)["out"]
    assert torch.equal(out[..., 2:4], exact.tensors["beta"].reshape(-1)[2:4].expand_as(out[..., 2:4]))


@pytest.mark.parametrize("scope", ("image", "batch"))
@parametrize_backends_and_dtypes(DTYPES)
def test_channels_of_zero_norm_behind_layer_norm(backend, scope, dtype):
    """Where LayerNorm's weight and bias are zero; its gradients are those of the identity there."""
    sample = make_sample("layer_norm_grn", c=6, scope=scope, at=("ragged", 4))
    for name in ("ln_weight", "ln_bias"):
        sample.tensors[name][2:4] = 0.0
    check(sample, backend.name, dtype, backend.device)
    exact = sample.cast(dtype, backend.device)
    out = exact.run(backend.name)["out"]
    assert torch.equal(out[..., 2:4], exact.tensors["beta"].reshape(-1)[2:4].expand_as(out[..., 2:4]))


@pytest.mark.parametrize("shift", (-100.0, 30.0))
@parametrize_backends_and_dtypes(DTYPES)
def test_layer_norm_of_a_large_bias_before_grn(backend, dtype, shift):
    """The bias outweighs the normalised rows in every sum that is made of sums of both."""
    sample = make_sample("layer_norm_grn", c=24, at=("ragged", 4))
    sample.tensors["ln_bias"] += shift
    check(sample, backend.name, dtype, backend.device)


@parametrize_backends_and_dtypes(DTYPES)
def test_a_bias_that_cancels_the_normalised_rows_before_grn(backend, dtype):
    """All rows are nearly the same, and the bias takes away what they share: GRN sees the remainders.

    GPU kernels, which sum over normalised rows instead of LayerNorm's output, bear larger remainders only."""
    remainder = 0.003 if backend.name == "cpu" else 0.03
    sample = make_sample("layer_norm_grn", c=24, at=("ragged", 4))
    x = sample.tensors["x"]
    x.copy_(x[:1, :1, :1] + remainder * x)
    z = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    sample.tensors["ln_bias"].copy_(-(sample.tensors["ln_weight"] * z).mean((0, 1, 2)))
    check(sample, backend.name, dtype, backend.device)


@pytest.mark.parametrize("op", ("global_response_norm", "gelu_grn"))
@parametrize_backends_and_dtypes((F32, F64, BF16, F16), reference=True)
def test_everything_zero(backend, op, dtype):
    sample = make_sample(op, c=6).cast(dtype, backend.device)
    sample.tensors["x"] = torch.zeros_like(sample.tensors["x"]).requires_grad_()
    out = sample.run(backend.name)["out"]
    cotangent = cotangent_of(out, dtype).to(out)
    grads = sample.run(backend.name, cotangent)
    assert torch.equal(out, sample.tensors["beta"].expand_as(out))
    # gelu'(0) is one half
    assert torch.equal(grads["x"], cotangent * (0.5 if op == "gelu_grn" else 1.0))
    assert torch.equal(grads["gamma"], torch.zeros_like(grads["gamma"]))


@pytest.mark.parametrize("op", WITH_GRN)
@parametrize_backends_and_dtypes(DTYPES)
def test_large_activations(backend, op, dtype):
    """Sums of squares far past 65504."""
    sample = make_sample(op, at=("ragged", 4))
    sample.tensors["x"] *= 3000.0
    check(sample, backend.name, dtype, backend.device)


@pytest.mark.parametrize("op", ("global_response_norm", "gelu_grn", "pointwise_mlp"))
def test_float16_sums_of_squares_do_not_overflow(op):
    """Statistics are float32 in the reference too: 64 rows of 300 squared are 5.8 million."""
    sample = make_sample(op, at=("uniform", 4))
    sample.tensors["x"] = sample.tensors["x"].sign() * 300.0
    rounded = sample.rounded(F16)
    exact, half = rounded.cast(F64), rounded.cast(F16)
    cotangent = cotangent_of(exact.run("reference")["out"], F16)
    truth, got = exact.run("reference", cotangent), half.run("auto", cotangent)
    for name, t in truth.items():
        assert torch.isfinite(got[name]).all(), f"{name} overflows"
        # a handful of roundings to 11 bits
        bound = 16 * torch.finfo(F16).eps * float(t.abs().max())
        assert float((got[name].double() - t).abs().max()) <= bound, name


@pytest.mark.parametrize("size", (1e-6, 1e-12, 1e-19))
@pytest.mark.parametrize("op", WITH_GRN)
@parametrize_backends()
def test_tiny_activations(backend, op, size):
    """Far below GRN's eps, down to squares that are denormal in float32."""
    sample = make_sample(op, at=("ragged", 4))
    sample.tensors["x"] *= size
    check(sample, backend.name, F32, backend.device)


@parametrize_backends_and_dtypes(DTYPES)
def test_layer_norm_of_one_channel(backend, dtype):
    """It is the bias, and nothing flows back to x."""
    x = torch.randn(2, 3, 3, 1).to(backend.device, dtype).requires_grad_()
    weight, bias = (torch.tensor([v]).to(backend.device, dtype).requires_grad_() for v in (1.5, 0.25))
    with ck.use_backend(backend.name):
        out = ck.ops.layer_norm(x, weight, bias)
    assert torch.equal(out, bias.expand_as(out))
    dx, dw = torch.autograd.grad(out, (x, weight), torch.randn_like(out))
    assert torch.equal(dx, torch.zeros_like(dx)) and torch.equal(dw, torch.zeros_like(dw))


@parametrize_backends()
def test_layer_norm_of_a_large_mean(backend):
    """The variance must not come from a difference of large squares, which are wrong by 0.1 here."""
    sample = make_sample("layer_norm", c=40)
    sample.tensors["x"] += 1000.0
    sample = sample.rounded(F32)
    truth = sample.cast(F64).run("reference")["out"]
    got = sample.cast(F32, backend.device).run(backend.name)["out"].double().cpu()
    # the mean is rounded to its own size, a few times, and nothing else is as large
    assert float((got - truth).abs().max()) <= 8 * torch.finfo(F32).eps * 1000.0


# both tails, the steep part and signed zeros
POINTS = torch.cat([torch.linspace(-15, 15, 1208), torch.tensor([-0.0, 0.0, 1e-30, -1e-30, 40.0, -40.0, 1e4, -1e4])])


@parametrize_backends_and_dtypes(DTYPES)
def test_gelu_over_its_whole_range(backend, dtype):
    """GRN with gamma 0 leaves the GELU alone."""
    zero = torch.zeros(1, dtype=F64)
    tensors = {"x": POINTS.double().view(1, 1, -1, 1), "gamma": zero, "beta": zero.clone()}
    check(Sample("gelu_grn", tensors, {}), backend.name, dtype, backend.device)


@pytest.mark.parametrize("act", ("gelu", "gelu_tanh"))
@parametrize_backends_and_dtypes(DTYPES)
def test_the_gelu_of_the_mlp_over_its_whole_range(backend, dtype, act):
    """So do products with the identity."""
    tensors = {"x": POINTS.double().view(1, 1, -1, 8)}
    tensors |= {name: torch.eye(8, dtype=F64) for name in ("w1", "w2")}
    tensors |= {name: torch.zeros(8, dtype=F64) for name in ("b1", "gamma", "beta", "b2")}
    check(Sample("pointwise_mlp", tensors, {"act": act}), backend.name, dtype, backend.device)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@parametrize_backends(reference=True)
def test_a_bad_number_is_not_swallowed(backend, value):
    """One NaN or infinity in an image reaches the output of that image, and of no other image."""
    layout = make_layout("uniform", backend.device)
    for op, axes in (*((op, {}) for op in WITH_GRN), ("pointwise_mlp", {"act": "gelu_tanh"})):
        sample = make_sample(op, at=("uniform", 2), **axes).cast(F32, backend.device)
        clean = sample.run(backend.name)["out"]
        with torch.no_grad():
            sample.tensors["x"][layout.image_offsets[1], 0, 0, 0] = value
        dirty = sample.run(backend.name)["out"]
        image = layout.image_of_slot
        others = image != 1
        assert torch.equal(dirty[others], clean[others]), f"{op}: another image changed"
        assert not torch.isfinite(dirty[image == 1]).all(), f"{op}: {value} disappeared"


def test_every_op_with_grn_is_here():
    with_grn = {op for op in SPECS if "gamma" in make_sample(op).tensors}
    assert with_grn - {"gathered_pointwise_mlp"} == set(WITH_GRN)
