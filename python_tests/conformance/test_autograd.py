"""The ops in PyTorch's ecosystem: second derivatives are refused, modules copied; checkpointing, inference mode."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import convnextv2_kernels as ck
from convnextv2_kernels import backends, nn

from .backends import F32, parametrize_backends
from .layouts import make_layout
from .samples import SPECS, cotangent_of, make_sample


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends()
def test_double_backward_is_refused(backend, op):
    sample = make_sample(op).cast(F32, backend.device)
    with ck.use_backend(backend.name):
        out = sample()
    inputs = [t for t in sample.tensors.values() if t is not None]
    with pytest.raises(
        RuntimeError, match=r"differentiated once only, got create_graph=True; .*use_backend\('reference'"
    ):
        torch.autograd.grad(out, inputs, torch.ones_like(out), create_graph=True)


@pytest.mark.parametrize("op", SPECS)
@parametrize_backends(reference=True)
def test_no_graph_where_none_is_wanted(backend, op):
    sample = make_sample(op).cast(F32, backend.device)
    expected = sample.run(backend.name)["out"]
    with torch.no_grad():
        out = sample.run(backend.name)["out"]
        assert torch.equal(out, expected) and not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(sample.run(backend.name)["out"], expected)
    frozen = sample._replace(tensors={k: None if t is None else t.detach() for k, t in sample.tensors.items()})
    with ck.use_backend(backend.name):
        assert not frozen().requires_grad


@parametrize_backends()
def test_activation_checkpointing(backend):
    sample = make_sample("convnextv2_block", at=("ragged", 4)).cast(F32, backend.device)
    names = [name for name, t in sample.tensors.items() if t is not None]
    leaves = [sample.tensors[name] for name in names]
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device)
    expected = sample.run(backend.name, cotangent)

    def function(*values):
        return sample._replace(tensors=sample.tensors | dict(zip(names, values, strict=True)))()

    with ck.use_backend(backend.name):
        out = checkpoint(function, *leaves, use_reentrant=False)
        grads = torch.autograd.grad(out, leaves, cotangent.to(out))
    assert all(torch.equal(g, expected[name]) for name, g in zip(names, grads, strict=True))


MODULES = {
    "SubmanifoldDepthwiseConv2d": lambda: nn.SubmanifoldDepthwiseConv2d(6, 5),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "GlobalResponseNorm": lambda: nn.GlobalResponseNorm(6, scope="batch"),
    "PointwiseMLP": lambda: nn.PointwiseMLP(6, 10),
    "ConvNeXtV2Block": lambda: nn.ConvNeXtV2Block(6),
    "Downsample": lambda: nn.Downsample(6, 8),
}


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", (copy.deepcopy, _pickled, _saved), ids=("deepcopy", "pickle", "save"))
@pytest.mark.parametrize("name", MODULES)
def test_modules_can_be_copied_and_pickled(name, duplicate):
    module = MODULES[name]()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    layout = make_layout("ragged")
    x = torch.randn(layout.num_patches, 4, 4, 6)
    expected = module(x, layout)
    assert torch.equal(duplicate(module)(x, duplicate(layout)), expected)


def test_use_backend_nests_and_restores():
    with ck.use_backend("auto"):  # restores the outer backend whatever happens inside
        with ck.use_backend("reference"):
            with ck.use_backend("cpu"):
                assert backends.forced() == "cpu"
            assert backends.forced() == "reference"
            with pytest.raises(KeyError), ck.use_backend("cpu"):
                raise KeyError
            assert backends.forced() == "reference"
        again = ck.use_backend("reference")
        with again, again:
            assert backends.forced() == "reference"
        assert backends.forced() == "auto", "one object entered twice leaves its choice behind"


@parametrize_backends()
def test_backward_runs_on_the_backend_of_its_forward(backend):
    """The backend is chosen once per node, not again when its backward runs."""
    sample = make_sample("gelu_grn").cast(F32, backend.device)
    with ck.use_backend(backend.name):
        out = sample()
    expected = sample.run(backend.name, torch.ones_like(out).double())
    with ck.use_backend("reference"):
        out.backward(torch.ones_like(out))
    assert torch.equal(sample.tensors["x"].grad, expected["x"])
