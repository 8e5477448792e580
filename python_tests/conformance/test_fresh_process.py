"""The CPU kernels of every instruction set, and other checks that need their own process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convnextv2_kernels as ck

from .backends import needs_cpu_kernels

pytestmark = needs_cpu_kernels
CAPABILITIES = {"avx2": ("AVX2", "AVX512"), "baseline": None}


def environment(**variables: str) -> dict[str, str]:
    roots = [str(Path(__file__).parents[1]), str(Path(ck.__file__).parents[1])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(roots)} | variables


@functools.cache
def fresh_process(isa: str) -> dict:
    variables = environment(
        CONVNEXTV2_KERNELS_CPU_ISA=isa,
        # the other vendor's GEMMs, which this process may not use
        CONVNEXTV2_KERNELS_CPU_GEMM="mm" if isa == "baseline" else "auto",
        CONVNEXTV2_KERNELS_BACKEND="auto",
        # 128 makes the C library fill fresh memory with 0x7f: enormous numbers, so that a kernel that reads
        # uninitialised memory is far off
        MALLOC_PERTURB_="128",
    )
    command = [sys.executable, "-m", "conformance.fresh_process"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("isa", CAPABILITIES)
def test_values_with_every_instruction_set(isa):
    needed = CAPABILITIES[isa]
    if needed is not None and torch.backends.cpu.get_cpu_capability() not in needed:
        pytest.skip(f"the processor has no {isa}")
    assert fresh_process(isa)["isa"] == isa


def test_kernels_use_as_many_threads_as_torch_is_told():
    idle, one, two = fresh_process("baseline")["threads"]
    if idle is None:
        pytest.skip("this system does not tell how many threads a process has")
    assert one == idle, "one thread was asked for, yet the kernels started others"
    assert two > one, "two threads were asked for, yet the kernels ran on one"


def test_operators_can_be_traced_before_the_first_call():
    assert fresh_process("baseline")["fakes"], "importing the package registers no fake for its operators"


IMPORT = """
import os
for variable, value in (("CONVNEXTV2_KERNELS_CPU_GEMM", "blas"), ("CONVNEXTV2_KERNELS_BACKEND", "gpu")):
    os.environ[variable] = value
    try:
        import convnextv2_kernels
    except ValueError as error:
        print(error)
    del os.environ[variable]
"""


def test_environment_variables_read_at_import_are_checked():
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "CONVNEXTV2_KERNELS_CPU_GEMM must be one of auto, onednn, mm, got 'blas'",
        "CONVNEXTV2_KERNELS_BACKEND must be one of reference, cpu, cuda, triton, cuda+triton, auto, got 'gpu'",
    ], done.stderr[-1000:]
