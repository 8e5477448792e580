from dataclasses import replace

import pytest
import torch

from convnextv2_kernels import PatchLayout, ops, random_mask
from convnextv2_kernels.benchmark.gate import GateError
from convnextv2_kernels.benchmark.op_bench import OpCase, measure_case, measure_ops, pack
from convnextv2_kernels.benchmark.op_specs import SPECS
from convnextv2_kernels.benchmark.options import Budget, Options

MASK = random_mask(2, (3, 4), 0.5, torch.Generator().manual_seed(0))
BY_NAME = {spec.name: spec for spec in SPECS}


def test_pack_is_the_layout_of_the_library():
    x = torch.randn(2, 12, 16, 5)
    layout = PatchLayout.from_mask(MASK)
    assert torch.equal(pack(x, MASK), ops.gather_patches(x, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_gate_of_every_op(spec, dtype):
    summary = OpCase(spec, 16, 4, MASK, dtype, seed=1).check()
    assert summary["results"] == 2 + len(spec.parameters)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_wrong_op_is_caught(spec):
    wrong = replace(spec, sparse=lambda x, p, layout: spec.sparse(x, p, layout) * (1 + 1e-4))
    with pytest.raises(GateError, match=f"{spec.name} C=16 s=4"):
        OpCase(wrong, 16, 4, MASK, torch.float32, seed=1).check()


def test_all_arms_are_timed_and_rated():
    case = OpCase(BY_NAME["depthwise_conv"], 16, 4, MASK, torch.float32, seed=1)
    row = measure_case(case, repeats=2, budget=Budget(None), min_seconds=0.0)
    assert set(row["arms"]) == {"sparse", "nchw", "channels_last"}
    assert row["time_ratio"] == pytest.approx(
        row["arms"][row["fastest_dense"]]["median_ms"] / row["arms"]["sparse"]["median_ms"]
    )
    for name, arm in row["arms"].items():
        work = row["work"]["sparse" if name == "sparse" else "dense"]
        assert arm["rates"]["gflops"] == pytest.approx(work["flops"] / arm["median_ms"] * 1e-6)
        assert len(arm["samples_ms"]) == 2


def test_spent_budget_names_what_it_skips():
    options = Options(batch_size=1, img_size=32, repeats=1)
    result = measure_ops("convnextv2_atto", options, Budget(1e-9), lambda message: None)
    assert result["rows"] == []
    assert len(result["skipped"]) == result["gate_cases"] == 4 * len(SPECS) - 1
