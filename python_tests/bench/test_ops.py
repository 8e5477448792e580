import pytest
import torch

from bench.ops import host_time
from bench.ops.cases import SPECS
from bench.ops.measure import OpCase, OpSettings, measure_case, measure_ops, pack
from convnextv2_kernels import PatchLayout, ops, random_mask
from convnextv2_kernels.benchmark.correctness import CorrectnessError
from convnextv2_kernels.benchmark.timing import Budget

MASK = random_mask(2, (3, 4), 0.5, torch.Generator().manual_seed(0))
BY_NAME = {spec.name: spec for spec in SPECS}


def test_pack_is_the_layout_of_the_library():
    x = torch.randn(2, 12, 16, 5)
    layout = PatchLayout.from_mask(MASK)
    assert torch.equal(pack(x, MASK), ops.gather_patches(x, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_check_of_every_op(spec, dtype):
    summary = OpCase(spec, 16, 4, MASK, dtype, seed=1).check()
    assert summary["results"] == (1 if spec.source == "images" else 2) + len(spec.parameters(16))


def test_no_public_op_is_missing():
    assert {spec.op for spec in SPECS} == set(ops.__all__)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_wrong_op_is_caught(spec, monkeypatch):
    right = getattr(ops, spec.op)
    monkeypatch.setattr(ops, spec.op, lambda *args, **more: right(*args, **more) * (1 + 1e-4))
    with pytest.raises(CorrectnessError, match=f"{spec.name} C=16 s=4"):
        OpCase(spec, 16, 4, MASK, torch.float32, seed=1).check()


def test_all_variants_are_timed_and_rated():
    case = OpCase(BY_NAME["depthwise_conv"], 16, 4, MASK, torch.float32, seed=1)
    row = measure_case(case, repeats=2, budget=Budget(None), min_seconds=0.0)
    assert set(row["variants"]) == {"sparse", "nchw", "channels_last"}
    assert row["control"]["of"] in ("nchw", "channels_last") and row["control"]["ratio"] > 0
    assert row["time_ratio"] == pytest.approx(
        row["variants"][row["fastest_dense"]]["median_ms"] / row["variants"]["sparse"]["median_ms"]
    )
    for name, variant in row["variants"].items():
        work = row["work"]["sparse" if name == "sparse" else "dense"]
        assert variant["rates"]["gflops"] == pytest.approx(work["flops"] / variant["median_ms"] * 1e-6)
        assert len(variant["samples_ms"]) == 2


@pytest.mark.parametrize(
    ("name", "peer", "counted"),
    [
        ("gather_patches", "indexing", "sparse"),
        ("scatter_patches", "indexing", "sparse"),
        ("gathered_pointwise_mlp", "gather linear", "sparse"),
        ("layer_norm_grn", "channels_last", "dense"),
    ],
)
def test_a_peer_is_rated_by_the_sites_it_computes(name, peer, counted):
    case = OpCase(BY_NAME[name], 16, 4, MASK, torch.float32, seed=1)
    variant = measure_case(case, repeats=1, budget=Budget(None), min_seconds=0.0)["variants"][peer]
    work = case.work(dense=counted == "dense")
    assert variant["counted"] == counted
    assert variant["rates"]["gbytes"] == pytest.approx(work.bytes / variant["median_ms"] * 1e-6)


@pytest.mark.thorough
def test_the_fastest_peer_is_compiled_too():
    case = OpCase(BY_NAME["layer_norm_grn"], 16, 4, MASK, torch.float32, seed=1)
    row = measure_case(case, repeats=1, budget=Budget(None), min_seconds=0.0, compiled=True)
    assert row["variants"]["channels_last compile"]["counted"] == "dense" and "compile_left_out" not in row


def test_a_peer_that_does_not_compile_is_left_out_with_the_reason(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    case = OpCase(BY_NAME["layer_norm"], 16, 4, MASK, torch.float32, seed=1)
    row = measure_case(case, repeats=1, budget=Budget(None), min_seconds=0.0, compiled=True)
    assert row["compile_left_out"] == "RuntimeError: no compiler" and set(row["variants"]) == {
        "sparse",
        "channels_last",
    }


@pytest.mark.thorough
def test_spent_budget_names_what_it_skips():
    settings = OpSettings(batch_size=1, img_size=64, repeats=1)
    result = measure_ops("convnextv2_atto", settings, Budget(1e-9), lambda message: None)
    assert result["rows"] == []
    assert (
        len(result["skipped"])
        == result["checked_cases"]
        == sum(spec.fits(side) for spec in SPECS for side in (8, 4, 2, 1))
    )


def test_host_time_is_measured_beside_timm():
    host = host_time.measure("convnextv2_atto", 1, Budget(None))
    assert host["width"] == 40 and list(host["passes"]) == ["forward", "forward and backward"]
    for found in host["passes"].values():
        names = set(found["variants"])
        assert {"block, packed", "block, fused dense"} <= names
        assert (host_time.BASELINE in names) == (found["control"]["ratio"] is not None)
        assert all(0 < row["median_us"] == pytest.approx(1e3 * row["median_ms"]) for row in found["variants"].values())
