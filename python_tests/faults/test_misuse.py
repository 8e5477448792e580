"""Calls that nobody planned: tensors of another kind, one tensor in two places, values changed too early, threads.

Each is an error in one sentence or has the reference's result, with its float64 as the judge.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch
from conformance.backends import F32, F64, Backend, needs_cpu_kernels, parametrize_backends
from conformance.samples import SPECS, Sample, cotangent_of, make_sample
from torch import Tensor

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout, nn

# axes that give many tensors of a call the same number of elements
EQUAL = {
    "submanifold_depthwise_conv2d": {"c": 5},
    "linear": {"c": 5, "out_c": 5},
    "downsample": {"c": 5, "out_c": 5},
    "pointwise_mlp": {"c": 6, "hidden": 6, "out_c": 6},
    "gathered_pointwise_mlp": {"c": 6, "hidden": 6, "out_c": 6},
    "convnextv2_block": {"c": 6, "hidden": 6},
}


def sentence(error: BaseException, *words: str) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 250, text
    assert all(word in text for word in words), text


# -- tensors of another kind

KINDS = {
    "sparse COO": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: t.reshape(-1, t.shape[-1]).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "integers": lambda t: t.to(torch.int32),
    "list": lambda t: t.tolist(),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch on prototypes of sparse and nested tensors
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", SPECS)
def test_every_argument_of_another_kind(op, kind):
    sample = make_sample(op, **EQUAL.get(op, {})).cast(F32)
    for name, t in sample.tensors.items():
        if t is None:
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(ck.ops, op)(**sample.tensors | {name: KINDS[kind](t.detach())}, **sample.constants)
        # a meta input finds the layout or the first parameter elsewhere
        sentence(caught.value, *(() if kind == "meta" else (name,)))


def modules() -> dict:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 6)
    images = torch.randn(2, 3, 64, 64)
    return {
        "SubmanifoldDepthwiseConv2d": (nn.SubmanifoldDepthwiseConv2d(6), x),
        "LayerNorm": (nn.LayerNorm(6), x),
        "GlobalResponseNorm": (nn.GlobalResponseNorm(6), x),
        "PointwiseMLP": (nn.PointwiseMLP(6), x),
        "ConvNeXtV2Block": (nn.ConvNeXtV2Block(6), x),
        "Downsample": (nn.Downsample(6, 8), x),
        "PatchEmbed": (nn.PatchEmbed(3, 6), images),
        "SparseEncoder": (ck.models.SparseEncoder(3, (1, 1, 1, 1), (4, 4, 4, 4)), images),
        "FCMAE": (ck.models.FCMAE((1, 1, 1, 1), (4, 4, 4, 4), img_size=64, decoder_embed_dim=8), images),
        "ConvNeXtV2": (ck.models.ConvNeXtV2(3, 5, (1, 1, 1, 1), (4, 4, 4, 4)), images),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_models_of_another_kind(kind):
    for name, (module, x) in modules().items():
        with pytest.raises((TypeError, ValueError)) as caught:
            module(KINDS[kind](x))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250, f"{name}: {caught.value}"


@pytest.mark.parametrize(
    "eps", (float("nan"), float("inf"), -1e-6, "1e-6", None, True, torch.tensor(1e-6), 1e-6 + 0j, [1e-6]), ids=repr
)
def test_an_eps_that_is_no_number(eps):
    seen = set()
    for op in SPECS:
        sample = make_sample(op).cast(F32)
        for name in ("eps", "ln_eps", "grn_eps"):
            if name not in getattr(ck.ops, op).__annotations__ or (name == "grn_eps" and eps is None):
                continue
            if op == "patch_embed":
                continue
            for backend in ("auto", "reference"):
                with ck.use_backend(backend), pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
                    getattr(ck.ops, op)(**sample.tensors, **(sample.constants | {name: eps}))
            seen.add(name)
    assert "eps" in seen


@pytest.mark.parametrize("equal", (1 + 0j, True, torch.tensor(1.0)), ids=repr)
def test_an_eps_that_equals_one_that_passed(equal):
    sample = make_sample("convnextv2_block").cast(F32)
    ck.ops.convnextv2_block(**sample.tensors, **(sample.constants | {"eps": 1.0, "grn_eps": 1.0}))
    for name in ("eps", "grn_eps"):
        given = sample.constants | {"eps": 1.0, "grn_eps": 1.0} | {name: equal}
        with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
            ck.ops.convnextv2_block(**sample.tensors, **given)


@parametrize_backends(reference=True)
@pytest.mark.parametrize("op", SPECS)
def test_shapes_without_data(op, backend):
    """On the device "meta" every op gives its shape, by the reference, unless kernels are asked for."""
    sample = make_sample(op).cast(F32)
    expected = sample.run("reference")["out"]
    moved = sample.cast(F32, "meta")
    if backend.name == "reference":
        out = moved()
        assert out.is_meta and out.shape == expected.shape and out.dtype == expected.dtype
        return
    with ck.use_backend(backend.name), pytest.raises(RuntimeError) as caught:
        moved()
    sentence(caught.value, "the input lies on meta")


def test_models_without_data():
    with torch.device("meta"):
        model = ck.models.FCMAE((1, 1, 1, 1), (4, 4, 4, 4), img_size=64, decoder_embed_dim=8)
        loss, pred, mask = model(torch.zeros(2, 3, 64, 64))
    assert loss.is_meta and pred.shape == (2, 3072, 2, 2) and mask.shape == (2, 4)


# -- one tensor in two places


def gradients(sample: Sample, shared: tuple[str, str], backend: str, dtype: torch.dtype, device: str, cotangent=None):
    """Output and gradients of leaves where the second tensor of ``shared`` is the first one, in its shape."""
    first, second = shared
    leaves = sample.cast(dtype, device)
    call = dict(leaves.tensors)
    call[second] = call[first].reshape(call[second].shape) if call[first].shape != call[second].shape else call[first]
    with ck.use_backend(backend):
        out = getattr(ck.ops, sample.op)(**call, **leaves.constants)
    if cotangent is None:
        return out.detach()
    names = [name for name, t in leaves.tensors.items() if t is not None and name != second]
    grads = torch.autograd.grad(out, [leaves.tensors[name] for name in names], cotangent.to(out))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def close(got: dict[str, Tensor], truth: dict[str, Tensor], label: str) -> None:
    """To a thousand roundings of the largest value: a lost gradient is off by all of it. Some cancel to zero, from
    values as large as the others."""
    sizes = {name: float(t.abs().max()) if t.numel() else 0.0 for name, t in truth.items()}
    most = max(sizes.values())
    for name, exact in truth.items():
        error = float((got[name].double().cpu() - exact).abs().max()) if exact.numel() else 0.0
        bound = 1e3 * torch.finfo(F32).eps * max(sizes[name], 0.1 * most)
        assert error <= bound, f"{label}: {name} is off by {error:.3e}, more than {bound:.3e}"


def pairs(op: str) -> list[tuple[str, str]]:
    """Tensors of a call that have as many elements as another."""
    tensors = {name: t for name, t in make_sample(op, **EQUAL.get(op, {})).tensors.items() if t is not None}
    return [(a, b) for a, b in permutations(tensors, 2) if tensors[a].numel() == tensors[b].numel()]


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("op", [op for op in SPECS if pairs(op)])
@parametrize_backends()
def test_one_tensor_in_two_places(backend, op):
    sample = make_sample(op, **EQUAL.get(op, {}))
    chosen = pairs(op)[:: 6 if backend.interpreted else 1]
    for shared in chosen:
        cotangent = cotangent_of(gradients(sample, shared, "reference", F64, "cpu"), F32)
        truth = gradients(sample, shared, "reference", F64, "cpu", cotangent)
        got = gradients(sample, shared, backend.name, F32, backend.device, cotangent)
        close(got, truth, f"{op} with {shared[1]} = {shared[0]}")


def test_ops_with_pairs_are_most():
    assert len([op for op in SPECS if pairs(op)]) == 10


@pytest.mark.parametrize("form", ("input and residual", "input as its weight"))
@parametrize_backends()
def test_the_input_as_another_argument(backend, form):
    def run(name: str, dtype: torch.dtype, device: str, cotangent=None):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 1, 1, 6, generator=generator, dtype=F64).to(device, dtype).requires_grad_()
        w = torch.randn(6, 6, generator=generator, dtype=F64).to(device, dtype).requires_grad_()
        v = torch.randn(6, generator=generator, dtype=F64).to(device, dtype).requires_grad_()
        first = w if form == "input and residual" else x.view(6, 6)
        with ck.use_backend(name):
            out = ck.ops.pointwise_mlp(x, first, v, v, v, first, v, residual=x)
        if cotangent is None:
            return out.detach()
        inputs = {"x": x, "v": v} | ({"w": w} if first is w else {})
        return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), cotangent.to(out)), strict=True))

    cotangent = cotangent_of(run("reference", F64, "cpu"), F32)
    close(run(backend.name, F32, backend.device, cotangent), run("reference", F64, "cpu", cotangent), form)


@parametrize_backends()
def test_layers_that_share_weights(backend):
    def run(name: str, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        first, second = (nn.ConvNeXtV2Block(6).to(F64) for _ in range(2))
        for parameter in (*first.parameters(), *second.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
        second.dwconv, second.pwconv1 = first.dwconv, first.pwconv1
        x = torch.randn(2, 4, 4, 6, dtype=F64)
        both = torch.nn.Sequential(first, second, first).to(device, dtype)
        with ck.use_backend(name):
            out = both(x.to(device, dtype))
        out.backward(torch.ones_like(out))
        return {"out": out.detach(), **{key: p.grad for key, p in both.named_parameters()}}

    close(run(backend.name, F32, backend.device), run("reference", F64, "cpu"), "shared layers")


def row(t: Tensor) -> Tensor:
    """One element everywhere, stride 0."""
    return t.flatten()[:1].expand(t.numel()).view(t.shape)


def overlapping(t: Tensor) -> Tensor:
    """Each row one element behind the one before."""
    if t.dim() < 2:
        return row(t)
    strides = [1, 1]
    for size in reversed(t.shape[1:-1]):
        strides.insert(0, strides[0] * size)
    return t.flatten().as_strided(t.shape, strides)


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("form", (row, overlapping), ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", SPECS)
@parametrize_backends()
def test_tensors_that_overlap_themselves(backend, op, form):
    """The gradient is of the memory behind the view, so it is a sum."""

    def run(name: str, dtype: torch.dtype, device: str, cotangent=None):
        leaves = make_sample(op).cast(dtype, device)
        views = {key: None if t is None else form(t) for key, t in leaves.tensors.items()}
        with ck.use_backend(name):
            out = getattr(ck.ops, op)(**views, **leaves.constants)
        if cotangent is None:
            return out.detach()
        wanted = {key: t for key, t in leaves.tensors.items() if t is not None}
        return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), cotangent.to(out)), strict=True))

    cotangent = cotangent_of(run("reference", F64, "cpu"), F32)
    truth, got = run("reference", F64, "cpu", cotangent), run(backend.name, F32, backend.device, cotangent)
    assert all(torch.isfinite(t).all() for t in got.values())
    with_norm = "norm" in op or op in ("downsample", "convnextv2_block")
    if form is overlapping or not with_norm:  # LayerNorm of equal channels divides rounding by the square root of eps
        close(got, truth, op)


@parametrize_backends(reference=True)
@pytest.mark.parametrize("op", SPECS)
def test_views_with_a_sign(backend, op):
    """``conj().imag`` is a view whose elements PyTorch negates when it reads them."""
    sample = make_sample(op).cast(F32, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device, F32)
    expected = sample.run(backend.name, cotangent)

    def negated(t: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert view.is_neg() and torch.equal(view, t)
        return view

    views = {key: None if t is None else negated(t.detach()).requires_grad_() for key, t in sample.tensors.items()}
    got = sample._replace(tensors=views).run(backend.name, negated(cotangent))
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, rtol=1e-4, atol=1e-5)


# -- values changed between forward and backward


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("op", SPECS)
@parametrize_backends(reference=True)
def test_a_saved_tensor_that_was_changed(backend, op):
    """PyTorch counts the changes of what is saved; a gradient of other values would be silent."""
    refused = 0
    sample = make_sample(op)
    for name in [name for name, t in sample.tensors.items() if t is not None]:
        leaves = sample.cast(F32, backend.device)
        changed = {key: None if t is None else t.clone() for key, t in leaves.tensors.items()}
        with ck.use_backend(backend.name):
            out = getattr(ck.ops, op)(**changed, **leaves.constants)
        wanted = {key: t for key, t in leaves.tensors.items() if t is not None}
        cotangent = cotangent_of(out.detach(), F32).to(out)
        expected = torch.autograd.grad(out, list(wanted.values()), cotangent, retain_graph=True)
        expected = dict(zip(wanted, expected, strict=True))
        with torch.no_grad():
            changed[name].mul_(2.0)
        try:
            got = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), cotangent), strict=True))
        except RuntimeError as error:
            assert "inplace" in str(error)
            refused += 1
        else:  # it is not saved
            assert all(torch.equal(got[key], expected[key]) for key in expected), f"silently another gradient: {name}"
    linear = op in ("gather_patches", "scatter_patches")
    assert refused > 0 or linear


@parametrize_backends(reference=True)
def test_tensors_of_inference_mode(backend):
    """They can be read, and cannot be saved for backward."""
    for op in SPECS:
        sample = make_sample(op).cast(F32, backend.device)
        expected = sample.run(backend.name)["out"]
        with torch.inference_mode():
            frozen = {key: None if t is None else t.detach().clone() for key, t in sample.tensors.items()}
        with ck.use_backend(backend.name), torch.no_grad():
            assert torch.equal(getattr(ck.ops, op)(**frozen, **sample.constants), expected)


# -- sizes


@parametrize_backends(reference=True)
@pytest.mark.parametrize("op", SPECS)
def test_empty_batches(backend, op):
    """Of no image: empty output, gradients of zero."""
    sample = make_sample(op, at=("batch_0", 2 if op != "patch_embed" else 1)).cast(F32, backend.device)
    out = sample.run(backend.name)["out"]
    assert out.numel() == 0
    grads = sample.run(backend.name, torch.zeros(out.shape))
    assert all(not t.any() for t in grads.values())


@pytest.mark.parametrize("size", (2**31, 2**40, 2**62))
def test_layouts_of_huge_sizes(size):
    """Refused before memory is asked for."""
    with pytest.raises((ValueError, RuntimeError)):
        PatchLayout.from_kept(torch.zeros(1, 1, dtype=torch.int64).expand(3, 1), (size, 1))
    with pytest.raises((ValueError, RuntimeError)):
        PatchLayout.from_mask(torch.zeros(1, 1, 1, dtype=torch.bool).expand(2, size, 1))


# -- threads


def together(functions: list, threads: int) -> list:
    """Results of functions that all start at once."""
    barrier = threading.Barrier(threads)

    def first(function):
        barrier.wait(timeout=60)
        return function()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(first, functions))


@parametrize_backends(reference=True)
def test_threads_have_equal_bits(backend: Backend):
    if backend.interpreted:
        pytest.skip("Triton's interpreter has one state for all threads")
    ops = ("convnextv2_block", "global_response_norm", "submanifold_depthwise_conv2d", "patch_embed", "downsample")
    samples = [make_sample(op).cast(F32, backend.device) for op in ops]
    cotangents = [cotangent_of(s.run(backend.name)["out"], F32).to(backend.device) for s in samples]
    expected = [s.run(backend.name, c) for s, c in zip(samples, cotangents, strict=True)]

    def work() -> bool:
        same = True
        with torch.random.fork_rng(devices=[]):
            for _ in range(20):
                for s, c, truth in zip(samples, cotangents, expected, strict=True):
                    leaves = s.cast(F32, backend.device)
                    out = leaves()
                    wanted = [t for t in leaves.tensors.values() if t is not None]
                    got = [out, *torch.autograd.grad(out, wanted, c.to(out))]
                    same = same and all(torch.equal(a, b) for a, b in zip(got, truth.values(), strict=True))
        return same

    with ck.use_backend(backend.name):
        assert all(together([work] * 4, 4))


FIRST_USE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch
import convnextv2_kernels as ck
sys.setswitchinterval(1e-5)
x = torch.randn(2, 4, 4, 6)
block = ck.nn.ConvNeXtV2Block(6)
barrier = threading.Barrier(8)
def first(i):
    barrier.wait(timeout=60)
    layout = ck.PatchLayout.from_mask(torch.arange(8).view(2, 2, 2) % 3 == 0)
    return block(x).detach(), block(torch.ones(5, 2, 2, 6), layout).detach()
with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(first, range(8)))
assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
print(ck.backends._selected and "selected")
"""


@needs_cpu_kernels
def test_the_first_use_from_threads():
    """Backends, operators and their fakes are found on first use, which may be that of several threads at once."""
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["selected"]
