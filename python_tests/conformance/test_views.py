"""Strides, offsets and alignment of inputs, parameters and cotangents change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import convnextv2_kernels as ck

from .backends import BF16, F32, parametrize_backends, parametrize_backends_and_dtypes
from .operators import WITH_PRODUCTS
from .samples import SPECS, cotangent_of, make_sample

AXES = {"at": ("ragged", 2)}


def transposed(t: Tensor) -> Tensor:
    """The same values with reversed strides: for a map, NHWC over NCHW memory."""
    if t.dim() == 4:
        return t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def sliced(t: Tensor) -> Tensor:
    """A slice out of a buffer that is wider in every dimension and full of NaN."""
    wide = torch.full([size + 2 for size in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, but one element off every vector boundary."""
    buffer = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
    return buffer[1:].view(t.shape).copy_(t)


def every_other(t: Tensor) -> Tensor:
    """Channels two elements apart."""
    buffer = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype, device=t.device)
    return buffer[..., 0].copy_(t)


FORMS = (transposed, sliced, misaligned, every_other)


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", SPECS)
@parametrize_backends_and_dtypes((F32, BF16), reference=True)
def test_views_give_the_same_values(backend, op, dtype, form):
    """Each argument alone as a view, then all of them."""
    sample = make_sample(op, **AXES).cast(dtype, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], dtype).to(backend.device, dtype)
    expected = sample.run(backend.name, cotangent)
    names = [name for name, t in sample.tensors.items() if t is not None]
    for chosen in [*([name] for name in names), ["cotangent"], [*names, "cotangent"]]:
        views = {name: form(sample.tensors[name].detach()).requires_grad_() for name in chosen if name in names}
        viewed = sample._replace(tensors=sample.tensors | views)
        got = viewed.run(backend.name, form(cotangent) if "cotangent" in chosen else cotangent)
        for name, t in expected.items():
            # a vendor's product may choose another order of summation for other strides; the rest has to be the same
            eps = 16 * torch.finfo(dtype).eps if op in WITH_PRODUCTS or backend.name == "reference" else 0.0
            error, bound = float((got[name] - t).abs().max()), eps * float(t.abs().max())
            assert error <= bound, f"{name} is off by {error:.3e} with {chosen} as views"


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends(reference=True)
def test_broadcast_cotangents(backend, op):
    """``out.sum()`` and ``out.mean()`` send a cotangent of stride zero."""
    sample = make_sample(op, **AXES).cast(F32, backend.device)
    out = sample.run(backend.name)["out"]
    expanded = torch.full((1,), 0.5, device=backend.device).expand(out.shape)
    got, expected = (sample.run(backend.name, c) for c in (expanded, expanded.contiguous()))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.thorough("triton")
@parametrize_backends(reference=True)
def test_only_what_is_asked_for_gets_a_gradient(backend):
    """Each tensor alone: an op must not rely on the others requiring a gradient."""
    for op in SPECS:
        sample = make_sample(op, **AXES).cast(F32, backend.device)
        out = sample.run(backend.name)["out"]
        cotangent = cotangent_of(out, F32).to(out)
        full = sample.run(backend.name, cotangent)
        for name in [name for name, t in sample.tensors.items() if t is not None]:
            others = {k: None if t is None else t.detach().requires_grad_(k == name) for k, t in sample.tensors.items()}
            with ck.use_backend(backend.name):
                single = sample._replace(tensors=others)()
            single.backward(cotangent)
            assert torch.equal(others[name].grad, full[name]), f"{op}: gradient of {name} alone differs"


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends(reference=True)
def test_inputs_and_cotangent_are_not_written(backend, op):
    """Kernels work in place on their own temporaries only."""
    for at in (("ragged", 2), ("uniform", 4)):
        sample = make_sample(op, at=at).cast(F32, backend.device)
        before = {k: None if t is None else t.detach().clone() for k, t in sample.tensors.items()}
        out = sample.run(backend.name)["out"]
        cotangent = cotangent_of(out, F32).to(out)
        copy = cotangent.clone()
        sample.run(backend.name, cotangent)
        assert torch.equal(cotangent, copy)
        for name, t in sample.tensors.items():
            assert t is None or torch.equal(t, before[name]), f"{name} was written"


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("form", (every_other, lambda t: t[:1].expand(t.shape)), ids=("column", "expanded"))
@pytest.mark.parametrize("op", ("pointwise_mlp", "convnextv2_block"))
@parametrize_backends(reference=True)
def test_a_drop_path_factor_may_be_a_column_of_a_table(backend, op, form):
    sample = make_sample(op, at=("uniform", 4), c=24, hidden=40, drop=True).cast(F32, backend.device)
    factors = form(sample.constants["drop_path_scale"])
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device, F32)
    results = []
    for scale in (factors, factors.clone().contiguous()):
        case = sample._replace(constants=sample.constants | {"drop_path_scale": scale})
        results.append(case.run(backend.name, cotangent))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
