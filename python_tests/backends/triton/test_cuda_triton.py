"""CUDA's kernels and Triton's GEMMs together: when ``auto`` takes both, and what they compute."""

from __future__ import annotations

import pytest
import torch
from conformance.samples import cotangent_of, make_sample
from conformance.tolerance import assert_conforms, errors

from convnextv2_kernels import backends
from convnextv2_kernels.settings import current

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
BOTH = "cuda+triton"
REASON = "not here"


@pytest.fixture
def present(monkeypatch):
    """Says which GPU backends there are."""

    def set_present(*names):
        for name in ("cuda", "triton", BOTH):
            found = None if name in names or (name == BOTH and len(names) == 2) else REASON
            monkeypatch.setattr(backends.REGISTRY[name], "unsupported_reason", lambda *_, found=found: found)

    return set_present


def test_auto_takes_both_where_both_are(present):
    present("cuda", "triton")
    assert backends.automatic("cuda", (BF16,)) == BOTH
    assert backends.automatic("cuda", (BF16, F32)) == BOTH
    assert backends.automatic("cpu", (F32,)) in ("cpu", "reference")


@pytest.mark.parametrize(("names", "expected"), [(("cuda",), "cuda"), (("triton",), "triton"), ((), "reference")])
def test_auto_takes_what_there_is(present, names, expected):
    present(*names)
    assert backends.automatic("cuda", (BF16,)) == expected


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
    from convnextv2_kernels.backends.triton import mlp

    monkeypatch.setattr(current, "save", policy)
    called = []
    for name in ("fused_forward", "fused_backward"):
        whole = getattr(mlp, name)
        monkeypatch.setattr(mlp, name, lambda *a, name=name, whole=whole: called.append(name) or whole(*a))
    dtype = F32 if backends.triton.INTERPRETED else BF16  # on a GPU the table leaves float32 to the vendor's GEMMs
    sample = make_sample("convnextv2_block", **axes).rounded(dtype)
    exact = sample.cast(F64)
    cotangent = cotangent_of(exact.run("reference")["out"], dtype)
    truth = exact.run("reference", cotangent)
    ordinary = errors(sample.cast(dtype).run("reference", cotangent), truth)
    device = backends.cuda.CUDABackend.device_type
    got = sample.cast(dtype, device).run(BOTH, cotangent.to(device))
    assert_conforms("convnextv2_block", got, truth, ordinary, dtype, sample.rows)
    assert "fused_forward" in called
