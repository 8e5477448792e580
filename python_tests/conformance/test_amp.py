"""The AMP table of ``dtypes.py``: dtypes and values of every op under CPU autocast."""

from __future__ import annotations

import pytest
import torch

import convnextv2_kernels as ck

from .backends import BF16, F16, F32, F64, needs_cpu_kernels, parametrize_backends, parametrize_backends_and_dtypes
from .operators import WITH_PRODUCTS
from .samples import SPECS, cotangent_of, make_sample
from .tolerance import allowed_times, assert_conforms, errors

AXES = {"at": ("ragged", 4)}


def run(sample, backend, cotangent, dtype):
    with torch.autocast(sample_device(sample), dtype=dtype):
        return sample.run(backend, cotangent)


def sample_device(sample) -> str:
    return next(t for t in sample.tensors.values() if t is not None).device.type


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends()
def test_values_and_dtypes_under_autocast(backend, op):
    """float32 features and parameters: GEMMs in 16 bits, all outputs and gradients in float32."""
    narrow = backend.narrow
    sample = make_sample(op, **AXES).rounded(F32)
    exact = sample.cast(F64)
    cotangent = cotangent_of(exact.run("reference")["out"], F32)
    truth = exact.run("reference", cotangent)
    ordinary = errors(run(sample.cast(F32), "reference", cotangent, narrow), truth)
    leaves = sample.cast(F32, backend.device)
    got = run(leaves, backend.name, cotangent.to(backend.device), narrow)
    assert all(t.dtype == F32 for t in got.values())
    unlowered = leaves.run(backend.name, cotangent.to(backend.device))
    if op in WITH_PRODUCTS:
        assert_conforms(op, got, truth, ordinary, F32, sample.rows, narrow, allowed_times(sample))
        change = (got["out"] - unlowered["out"]).abs().max() / unlowered["out"].abs().max()
        assert float(change) > 1e-4, f"the products did not run in {narrow}"
    else:
        assert all(torch.equal(got[name], unlowered[name]) for name in got), "autocast has no part in this op"


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends(reference=True)
def test_narrow_features_and_float32_parameters(backend, op):
    """A residual stream in 16 bits: outputs and gradients keep the dtype of their tensors."""
    narrow = backend.narrow
    sample = make_sample(op, **AXES).rounded(narrow)
    exact = sample.cast(F64)
    cotangent = cotangent_of(exact.run("reference")["out"], narrow)
    truth = exact.run("reference", cotangent)
    ordinary = errors(sample.cast(narrow).run("reference", cotangent), truth)
    leaves = sample.cast(F32, backend.device)
    for name in ("x", "images", "residual"):
        if leaves.tensors.get(name) is not None:
            leaves.tensors[name] = leaves.tensors[name].detach().to(narrow).requires_grad_()
    got = run(leaves, backend.name, cotangent.to(backend.device), narrow)
    assert got["out"].dtype == narrow
    for name, t in leaves.tensors.items():
        assert t is None or got[name].dtype == t.dtype, f"gradient of {name} is {got[name].dtype}, not {t.dtype}"
    assert_conforms(
        op, {k: t.to(narrow) for k, t in got.items()}, truth, ordinary, narrow, sample.rows, times=allowed_times(sample)
    )


@pytest.mark.parametrize("scope", ("image", "batch"))
@parametrize_backends(reference=True)
def test_residual_of_another_dtype(backend, scope):
    """The output has the dtype of x, not that of the residual."""
    narrow = backend.narrow
    sample = make_sample("pointwise_mlp", scope=scope, **AXES).cast(F32, backend.device)
    sample.tensors["x"] = sample.tensors["x"].detach().to(narrow).requires_grad_()
    cotangent = torch.ones_like(sample.tensors["residual"])
    got = run(sample, backend.name, cotangent, narrow)
    assert got["out"].dtype == narrow
    assert got["residual"].dtype == F32 and got["x"].dtype == narrow


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("op", SPECS)
@parametrize_backends_and_dtypes((F64,), reference=True)
def test_float64_is_untouched(backend, dtype, op):
    sample = make_sample(op, **AXES).cast(dtype, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], dtype).to(backend.device)
    expected = sample.run(backend.name, cotangent)
    got = run(sample, backend.name, cotangent, backend.narrow)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("op", SPECS)
@needs_cpu_kernels
def test_float16_autocast_on_a_cpu(op):
    """No CPU kernel supports float16: GEMMs run on the reference by default, and a forced backend raises an error."""
    sample = make_sample(op, **AXES).cast(F32)
    cotangent = cotangent_of(sample.run("reference")["out"], F32)
    got, expected = (run(sample, backend, cotangent, F16) for backend in ("auto", "reference"))
    assert all(t.dtype == F32 and torch.isfinite(t).all() for t in got.values())
    if op in WITH_PRODUCTS:
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        # patch_embed's product is that of ``linear``
        with pytest.raises(RuntimeError, match=r"was asked of backend 'cpu', but .*float16"):
            run(sample, "cpu", cotangent, F16)


def test_autocast_that_is_switched_off_does_nothing():
    sample = make_sample("convnextv2_block").cast(F32)
    with torch.autocast("cpu", dtype=BF16, enabled=False):
        got = sample.run("auto")["out"]
    assert torch.equal(got, sample.run("auto")["out"])


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("op", SPECS)
@parametrize_backends()
def test_backward_inside_and_outside_of_autocast(backend, op):
    """Sums over rows stay float32 where a training loop calls backward inside the context too."""
    sample = make_sample(op, **AXES).cast(F32, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device)
    inside = run(sample, backend.name, cotangent, backend.narrow)
    names = [name for name, t in sample.tensors.items() if t is not None]
    with ck.use_backend(backend.name), torch.autocast(backend.device, dtype=backend.narrow):
        out = sample()
    outside = torch.autograd.grad(out, [sample.tensors[name] for name in names], cotangent.to(out))
    for name, gradient in zip(names, outside, strict=True):
        assert torch.equal(inside[name], gradient), f"the gradient of {name} differs"
