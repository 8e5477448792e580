"""What nvcc says of every kernel on the architectures we promise: no spills, and registers within a budget.

A budget is the register count that the kernel's occupancy was planned with (docs/kernels/gpu.md); a change that
exceeds it needs a new plan.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import kernel_resources as resources

ROOT = Path(__file__).resolve().parents[3]

needs_nvcc = pytest.mark.skipif(resources.nvcc() is None, reason="no nvcc")
# all read the report of one compilation of every source, which takes minutes
thorough = pytest.mark.thorough

# Registers of a thread. 255 is the hardware's limit, 168 leaves 12 warps on a multiprocessor, 128 leaves 16, 80 leaves
# 25, 64 leaves 32. sm_100 holds pairs of accumulators for its packed multiply-add and pays for it in registers.
BUDGETS = {
    "conv_tile": {"sm_80": 168, "sm_90": 168, "sm_100": 224},
    "conv_small_patch": {"sm_80": 208, "sm_90": 168, "sm_100": 208},
    "conv_mma": 208,  # a fragment of eight tiles and its sums
    "conv_weight_grad_small_patch": 255,  # weight gradient, sides 4 and 2: 49 sums of two channels each
    "conv_weight_grad_tile": 255,  # weight gradient, tiles of 8 x 8
    "norm_backward_kernel": 168,  # keeps its columns' sums from row to row
    "conv_weight_grad_generic": 128,
    "gradient_rows_kernel": 104,
    "grn_gradient_kernel": 104,
    "layer_norm_grn_gradient_kernel": 96,
    "normalized_squares_kernel": 192,  # float64; 128 in 16 bits: two rows, or four, and the sums of their columns
    "normalized_gradient_kernel": 255,  # float64 by single elements; 128 in 16 bits and aligned float32
}
DEFAULT_BUDGET = 80


def budget(kernel: str, arch: str) -> int:
    limit = BUDGETS.get(resources.template_name(kernel), DEFAULT_BUDGET)
    return limit if isinstance(limit, int) else limit[arch]


@pytest.fixture(scope="module")
def rows():
    return resources.measure_all()


@needs_nvcc
@thorough
def test_every_source_has_kernels_for_every_architecture(rows):
    without = {"conv/forward.cu", "conv/mma.cu", "mlp/rows.cu"}  # launch the kernels of other files
    for source in {resources.source_name(path) for path in resources.sources()} - without:
        archs = {row["arch"] for row in rows if row["source"] == source}
        assert archs == set(resources.ARCHITECTURES), f"{source} has kernels for {sorted(archs)}"


@needs_nvcc
@thorough
def test_no_kernel_spills(rows):
    assert rows
    assert [f"{row['kernel']} on {row['arch']}: {row['spills']} bytes" for row in rows if row["spills"]] == []


@needs_nvcc
@thorough
def test_registers_stay_within_their_budgets(rows):
    over = [
        f"{row['kernel']} on {row['arch']}: {row['registers']} of {budget(row['kernel'], row['arch'])}"
        for row in rows
        if row["registers"] > budget(row["kernel"], row["arch"])
    ]
    assert over == []


@needs_nvcc
@thorough
def test_every_budget_is_of_a_kernel(rows):
    assert set(BUDGETS) <= {resources.template_name(row["kernel"]) for row in rows}


@needs_nvcc
@thorough
def test_the_committed_table_is_what_nvcc_says(rows):
    committed = json.loads(resources.RESULT.read_text())
    if committed["nvcc"] != resources.nvcc_release():
        pytest.skip(f"the table is of nvcc {committed['nvcc']}")
    measured = json.loads(json.dumps(resources.summary(rows)))
    assert committed == measured, "run python -m bench resources cuda --write && python -m bench tables"


@needs_nvcc
@thorough
def test_static_shared_memory_fits_every_gpu(rows):
    assert [row for row in rows if row["shared"] > 48 * 1024] == []


def test_the_parser_reads_what_ptxas_writes():
    report = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'
ptxas info    : Function properties for _Z1kPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compiling entry function '_Z1jPf' for 'sm_80'
ptxas info    : Function properties for _Z1jPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
    assert resources.parse(report) == [
        {"kernel": "_Z1kPf", "arch": "sm_90", "stack": 16, "spills": 20, "registers": 255, "shared": 4096},
        {"kernel": "_Z1jPf", "arch": "sm_80", "stack": 0, "spills": 0, "registers": 12, "shared": 0},
    ]
