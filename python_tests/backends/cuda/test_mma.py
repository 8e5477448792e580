"""The convolution on tensor cores conforms like the other; it is asked for by CONVNEXTV2_KERNELS_CUDA_CONV."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conformance.backends import BF16, F16, dtype_name
from conformance.samples import make_sample
from conformance.tolerance import check

from convnextv2_kernels import ops, use_backend
from convnextv2_kernels.backends import cuda

pytestmark = pytest.mark.skipif(cuda.load_error() is not None, reason=str(cuda.load_error()))

# sides that are multiples of 8, and one that is not, which the other kernels serve all the same
PLACES = [("uniform", 8), ("ragged", 8), ("none_visible", 8), ("all_visible", 16), ("ragged", 4), ("dense_16x24", None)]


def sample_at(op: str, at: tuple, c: int):
    if at[0] != "dense_16x24":
        return make_sample(op, at=at, c=c, k=7, bias=True)
    sample = make_sample(op, at=("dense_7x7", None), c=c, k=7, bias=True)
    sample.tensors["x"] = torch.randn(2, 16, 24, c, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return sample


@pytest.mark.parametrize("dtype", (BF16, F16), ids=dtype_name)
@pytest.mark.parametrize("c", (40, 22, 5))
@pytest.mark.parametrize("at", PLACES, ids=lambda at: f"{at[0]}-{at[1]}")
@pytest.mark.parametrize("op", ("submanifold_depthwise_conv2d", "depthwise_conv_layer_norm"))
def test_values_and_gradients(op, at, c, dtype, monkeypatch):
    monkeypatch.setenv("CONVNEXTV2_KERNELS_CUDA_CONV", "tensor")
    check(sample_at(op, at, c), "cuda", dtype, cuda.CUDABackend.device_type)


def test_the_whole_block(monkeypatch):
    monkeypatch.setenv("CONVNEXTV2_KERNELS_CUDA_CONV", "tensor")
    check(make_sample("convnextv2_block", at=("ragged", 8), c=24), "cuda", BF16, cuda.CUDABackend.device_type)


def test_an_unknown_choice_is_refused():
    code = """
import torch
from convnextv2_kernels import ops, use_backend
from convnextv2_kernels.backends import cuda
with use_backend("cuda"):
    device = cuda.CUDABackend.device_type
    x, w = torch.ones(1, 8, 8, 2, device=device), torch.ones(2, 1, 7, 7, device=device)
    ops.submanifold_depthwise_conv2d(x, w)
"""
    environment = {**os.environ, "CONVNEXTV2_KERNELS_CUDA_CONV": "fast"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "CONVNEXTV2_KERNELS_CUDA_CONV must be one of fma, tensor, got 'fast'" in done.stderr


def test_a_patch_reaches_its_neighbours_alone(monkeypatch):
    """Zero rows stand for hidden neighbours: NaN anywhere else must not get in, whatever it is multiplied by."""
    monkeypatch.setenv("CONVNEXTV2_KERNELS_CUDA_CONV", "tensor")
    sample = make_sample("submanifold_depthwise_conv2d", at=("ragged", 8), c=40, k=7, bias=True)
    sample = sample.cast(BF16, cuda.CUDABackend.device_type)
    layout, x = sample.constants["layout"], sample.tensors["x"].detach()
    w, b = sample.tensors["weight"], sample.tensors["bias"]
    reached = layout.neighbour_slots(1)
    with use_backend("cuda"):
        clean = ops.submanifold_depthwise_conv2d(x, w, b, layout)
        for slot in range(layout.num_patches):
            poisoned = x.clone()
            poisoned[slot] = float("nan")
            got = ops.submanifold_depthwise_conv2d(poisoned, w, b, layout)
            others = ~(reached == slot).any(1)
            assert torch.equal(got[others], clean[others]) and bool(got[slot].isnan().all())
    assert bool((~(reached == 0).any(1)).any()), "some patch must lie out of reach"
