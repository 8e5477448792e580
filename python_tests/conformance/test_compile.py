"""``torch.compile(fullgraph=True)`` and ``torch.export``: the same outputs and gradients as eager."""

from __future__ import annotations

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout, random_kept
from convnextv2_kernels.models import SparseEncoder

from .backends import F32, needs_cpu_kernels, parametrize_backends
from .layouts import make_layout
from .samples import SPECS, cotangent_of, make_sample


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_close(got, expected, factor: float = 16.0):
    """Equal up to the rounding of the same operations in another order."""
    for name, t in expected.items():
        if t.numel():
            bound = factor * torch.finfo(t.dtype).eps * float(t.abs().max())
            error = float((got[name] - t).abs().max())
            assert error <= bound, f"{name} is off by {error:.3e}, more than {bound:.3e}"


def run_compiled(sample, backend, cotangent):
    names = [name for name, t in sample.tensors.items() if t is not None]

    def function(*values):
        return sample._replace(tensors=sample.tensors | dict(zip(names, values, strict=True)))()

    leaves = [sample.tensors[name] for name in names]
    with ck.use_backend(backend):
        out = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
        grads = torch.autograd.grad(out, leaves, cotangent.to(out))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def check(op, backend, **axes):
    sample = make_sample(op, **axes).cast(F32, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device)
    expected = sample.run(backend.name, cotangent)
    assert_close(run_compiled(sample, backend.name, cotangent), expected)


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends()
def test_every_op_compiles_without_a_graph_break(backend, op):
    check(op, backend, at=("uniform", 2))


@pytest.mark.parametrize("op", ("convnextv2_block", "global_response_norm"))
@parametrize_backends()
def test_ragged_layouts_compile(backend, op):
    check(op, backend, at=("ragged", 2))


@parametrize_backends()
def test_the_other_gelu_and_eps_compile(backend):
    check("convnextv2_block", backend, act="gelu_tanh", grn_eps=0.5)


@parametrize_backends()
def test_compiled_under_autocast(backend):
    sample = make_sample("convnextv2_block", at=("uniform", 2)).cast(F32, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device)
    with torch.autocast(backend.device, dtype=backend.narrow):
        expected = sample.run(backend.name, cotangent)
        got = run_compiled(sample, backend.name, cotangent)
    assert_close(got, expected)


class _Encoder(torch.nn.Module):
    """The trace of a training step: the layout built from visible ids, then the encoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = SparseEncoder(3, depths=(1, 1, 1, 1), dims=(4, 8, 12, 16))
        for parameter in self.encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, images, kept):
        return self.encoder(images, PatchLayout.from_kept(kept, (2, 3)))


def _inputs(device, images=2):
    return torch.randn(images, 3, 64, 96).to(device), random_kept(images, (2, 3), 0.5).to(device)


def _gradients(function, model, *inputs):
    parameters = dict(model.named_parameters())
    out = function(*inputs)
    grads = torch.autograd.grad(out, list(parameters.values()), torch.ones_like(out))
    return {"out": out.detach(), **dict(zip(parameters, grads, strict=True))}


@pytest.mark.thorough("triton")
@parametrize_backends()
def test_the_encoder_and_its_layout_in_one_graph(backend):
    """A layout of equal counts is built without a sync, so it can be part of the graph."""
    model = _Encoder().to(backend.device)
    inputs = _inputs(backend.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ck.use_backend(backend.name):
        assert_close(_gradients(compiled, model, *inputs), _gradients(model, model, *inputs))


@pytest.mark.thorough("cuda", "triton")
@parametrize_backends()
def test_the_encoder_compiles_with_inductor(backend):
    model = _Encoder().to(backend.device).encoder
    images, kept = _inputs(backend.device)
    layout = PatchLayout.from_kept(kept, (2, 3))
    compiled = torch.compile(model, fullgraph=True)
    with ck.use_backend(backend.name):
        expected = _gradients(model, model, images, layout)  # also builds the layout's tables
        got = _gradients(compiled, model, images, layout)
    # inductor's fused code adds the terms of some gradients in another order
    assert_close(got, expected, factor=200.0)


@pytest.mark.thorough("triton")
@parametrize_backends()
def test_the_encoder_exports(backend):
    model = _Encoder().to(backend.device).eval()
    images, kept = _inputs(backend.device)
    with ck.use_backend(backend.name), torch.no_grad():
        program = torch.export.export(model, (images, kept))
        other_images, other_kept = _inputs(backend.device)
        expected = model(other_images, other_kept)
        got = program.module()(other_images, other_kept)
    # the mask is an input of the exported program, not a constant in it
    assert not torch.equal(kept, other_kept)
    assert_close({"out": got}, {"out": expected})


@needs_cpu_kernels
def test_a_change_of_backend_is_seen_by_compiled_code():
    """The choice of backend is a guard, not a constant of the graph."""
    sample = make_sample("gelu_grn").cast(F32)
    seen = []

    def record(graph, _):
        seen.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    compiled = torch.compile(lambda: sample(), backend=record)
    for name in ("reference", "auto", "reference"):
        with ck.use_backend(name):
            got = compiled()
            assert torch.allclose(got, sample())
    assert len(seen) == 2 and seen[0] != seen[1]


def test_neighbour_tables_inside_a_graph():
    """Packed convolution with a layout that enters the graph from outside and has no table yet."""
    sample = make_sample("submanifold_depthwise_conv2d", at=("ragged", 2), k=7).cast(F32)
    expected = sample.run("auto")["out"]
    fresh = make_layout("ragged")
    x, weight, bias = sample.tensors.values()
    compiled = torch.compile(ck.ops.submanifold_depthwise_conv2d, fullgraph=True, backend="aot_eager")
    with ck.use_backend("auto"):
        assert torch.equal(compiled(x, weight, bias, fresh), expected)
