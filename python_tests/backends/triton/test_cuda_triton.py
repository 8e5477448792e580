"""CUDA's kernels and Triton's products together: when ``auto`` takes both, and what they compute."""

from __future__ import annotations

import pytest
import torch
from conformance.samples import cotangent_of, make_sample
from conformance.tolerance import assert_conforms, errors

from convnextv2_kernels import backends

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
REASON = "not here"


@pytest.fixture
def present(monkeypatch):
    """Says which GPU backends there are."""

    def set_present(*names):
        for name in ("cuda", "triton"):
            module, found = getattr(backends, name), None if name in names else REASON
            monkeypatch.setattr(module, "why_not", lambda *_, found=found: found)

    return set_present


def test_auto_takes_both_for_ops_with_products(present):
    present("cuda", "triton")
    assert backends.automatic("convnextv2_block", "cuda", (BF16,)) == "cuda+triton"
    assert backends.automatic("pointwise_mlp", "cuda", (BF16, F32)) == "cuda+triton"
    assert backends.automatic("layer_norm", "cuda", (BF16,)) == "cuda"
    assert backends.automatic("convnextv2_block", "cpu", (F32,)) in ("cpu", "reference")


@pytest.mark.parametrize(("names", "expected"), [(("cuda",), "cuda"), (("triton",), "triton"), ((), "reference")])
def test_auto_takes_what_there_is(present, names, expected):
    present(*names)
    assert backends.automatic("convnextv2_block", "cuda", (BF16,)) == expected


both = pytest.mark.skipif(
    not (backends.cuda.EMULATED and backends.triton.INTERPRETED) and not torch.cuda.is_available(),
    reason="needs a GPU, or emulated CUDA kernels (CONVNEXTV2_KERNELS_CUDA_EMULATION) and TRITON_INTERPRET=1",
)


@both
@pytest.mark.parametrize("policy", ("inputs", "hidden"))
@pytest.mark.parametrize(
    "axes",
    [
        {"at": ("uniform", 4), "c": 24, "drop": True},
        {"at": ("ragged", 4), "c": 24, "scope": "batch"},
        {"at": ("uniform", 2), "c": 24, "act": "gelu_tanh"},
    ],
)
def test_the_block_by_both_conforms(axes, policy, monkeypatch):
    from convnextv2_kernels.backends.triton import fused

    monkeypatch.setenv("CONVNEXTV2_KERNELS_SAVE", policy)
    monkeypatch.setattr(backends, "select", lambda *_: backends.MIXED)
    served = []
    for way in ("forward_by", "backward_by"):
        whole = getattr(fused, way)
        monkeypatch.setattr(fused, way, lambda *a, way=way, whole=whole: served.append(way) or whole(*a))
    dtype = F32 if backends.triton.INTERPRETED else BF16  # on a GPU the table leaves float32 to the library
    sample = make_sample("convnextv2_block", **axes).rounded(dtype)
    exact = sample.cast(F64)
    with monkeypatch.context() as m:
        m.setattr(backends, "select", lambda *_: "reference")
        cotangent = cotangent_of(exact.run("reference")["out"], dtype)
        truth = exact.run("reference", cotangent)
        ordinary = errors(sample.cast(dtype).run("reference", cotangent), truth)
    device = backends.cuda.DEVICE
    got = sample.cast(dtype, device).run("auto", cotangent.to(device))
    assert_conforms("convnextv2_block", got, truth, ordinary, dtype, sample.rows)
    assert "forward_by" in served
