"""Results are complete, repeatable, and independent of the number of threads."""

from __future__ import annotations

import pytest
import torch

from convnextv2_kernels import backends

from .backends import BACKENDS, BF16, F32, dtype_name, marks, parametrize_backends_and_dtypes
from .operators import COMPOSITE, LARGE, ONLY, SAMPLES, WITH_PRODUCTS, Draw, names_on, operator
from .samples import SPECS, cotangent_of, make_sample
from .tolerance import check

PLACES = [("ragged", 4), ("uniform", 2), ("empty_image", 4), ("none_visible", 2), ("batch_0", 2)]


def run(op, axes, backend, dtype):
    sample = make_sample(op, **axes).cast(dtype, backend.device)
    out = sample.run(backend.name)["out"]
    return sample.run(backend.name, cotangent_of(out, dtype).to(backend.device))


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends_and_dtypes((F32, BF16), reference=True)
def test_poisoned_memory_and_repetition(backend, op, dtype):
    """With NaN in all fresh memory every element must have been written; and a second run gives the same bits."""
    for at in PLACES[1:4] if backend.interpreted else PLACES:
        torch.use_deterministic_algorithms(False)
        clean = run(op, {"at": at}, backend, dtype)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3, dtype=dtype, device=backend.device).isnan().all()
        poisoned = run(op, {"at": at}, backend, dtype)
        for name, t in poisoned.items():
            assert torch.isfinite(t).all(), f"{name} is not finite at {at}"
        assert_same_bits(clean, poisoned)


def _large(op):
    """Axes with enough rows and channels for every kernel to split its work."""
    axes = {"at": ("ragged", 8), "c": 40}
    if "hidden" in SPECS[op].small:
        axes["hidden"] = 70
    if "k" in SPECS[op].small:
        axes["k"] = 7
    return axes


@pytest.mark.parametrize("op", [op for op in SPECS if op not in WITH_PRODUCTS])
@parametrize_backends_and_dtypes((F32, BF16))
def test_native_ops_have_the_same_bits_with_two_threads(backend, op, dtype):
    if backend.interpreted:
        pytest.skip("the interpreter has one thread")
    for s in (8, 2):
        axes = _large(op) | {"at": ("ragged", s)}
        one = run(op, axes, backend, dtype)
        torch.set_num_threads(2)
        assert_same_bits(one, run(op, axes, backend, dtype))
        torch.set_num_threads(1)


NATIVE = [
    pytest.param(backend, name, dtype, id=f"{backend.name}-{name}-{dtype_name(dtype)}", marks=marks(backend))
    for backend in BACKENDS
    for name in names_on(backend)
    for dtype in ONLY.get(name, (F32, BF16))
    if name not in COMPOSITE and not backend.interpreted  # the interpreter has one thread
]


@pytest.mark.parametrize(("backend", "name", "dtype"), NATIVE)
def test_native_operators_have_the_same_bits_with_two_threads(backend, name, dtype):
    _ = backends.get(backend.name).operators  # registers them
    op = operator(name, backend)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        arguments = SAMPLES[name](Draw(dtype, backend.device, True, backend.name, LARGE))
        out = op(*arguments)
        tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
        # operators with an underscore write into their first arguments
        results.append(tensors + [a for a in arguments if isinstance(a, torch.Tensor)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", WITH_PRODUCTS)
@parametrize_backends_and_dtypes((F32, BF16))
def test_ops_with_products_conform_with_two_threads(backend, op, dtype):
    torch.set_num_threads(2)
    axes = _large(op) | {"at": ("ragged", 4), "c": 24}
    check(make_sample(op, **axes), backend.name, dtype, backend.device)
