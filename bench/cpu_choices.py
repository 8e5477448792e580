"""Measures the choices the CPU backend makes by default, so that docs/kernels/mlp.md states them from a file.

    python bench/cpu_choices.py --output bench/results/cpu_choices.json

Matrix products by library over the shapes of FCMAE's stages; the step under each policy of what is kept for backward;
the step under several chunk sizes. Interleaved medians, as everywhere. On an Intel processor, where the backend itself
mixes libraries, ``CONVNEXTV2_KERNELS_CPU_GEMM=onednn`` and ``--only products`` set one against the other.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from convnextv2_kernels import schedule
from convnextv2_kernels.backends import cpu_gemm
from convnextv2_kernels.benchmark.arms import make_batch, make_sparse
from convnextv2_kernels.benchmark.machine import describe
from convnextv2_kernels.benchmark.memory import saved_bytes
from convnextv2_kernels.benchmark.report import write_report
from convnextv2_kernels.benchmark.timing import summarize, time_interleaved

MODELS = ("convnextv2_atto", "convnextv2_tiny")
BATCH = 8
VISIBLE = 19
CHUNK_MIB = (0.75, 1.5, 3.0, 6.0, 12.0)


def measure_products(rounds: int) -> list[dict]:
    """GFLOP/s of the MLP's products by ``mm`` (MKL) and by the backend, for every stage: ``y W1'``, the gradients of
    its operands, and those of ``h W2'``."""
    rows = []
    for width in (40, 96):
        for stage, side in enumerate((8, 4, 2, 1)):
            m, c = BATCH * VISIBLE * side * side, width << stage
            x, w1, w2, h = torch.randn(m, c), torch.randn(4 * c, c), torch.randn(c, 4 * c), torch.randn(m, 4 * c)
            calls: dict[str, Callable[[], object]] = {
                "mm": lambda x=x, w=w1: F.linear(x, w),
                "backend": lambda x=x, w=w1: cpu_gemm.linear(x, w, None),
                "mm input gradient": lambda g=h, w=w1: g @ w,
                "backend input gradient": lambda g=h, w=w1: cpu_gemm.linear_input_grad(g, w),
                "mm weight gradient": lambda x=x, g=h: g.t() @ x,
                "backend weight gradient": lambda x=x, g=h: cpu_gemm.linear_weight_grad(g, x),
                "mm second input gradient": lambda g=x, w=w2: g @ w,
                "backend second input gradient": lambda g=x, w=w2: cpu_gemm.linear_input_grad(g, w),
                "mm second weight gradient": lambda x=h, g=x: g.t() @ x,
                "backend second weight gradient": lambda x=h, g=x: cpu_gemm.linear_weight_grad(g, x),
            }
            for call in calls.values():
                call()
            flops = 8 * m * c * c
            samples = time_interleaved(calls, rounds)
            rates = {k: round(flops / summarize(v)["median_ms"] * 1e-6, 1) for k, v in samples.items()}
            rows.append({"rows": m, "width": c, "gflops": rates})
    return rows


def measure_step(model: str, variable: str, values: tuple[str, ...], rounds: int) -> dict:
    """The step with an environment variable at each value: milliseconds and bytes saved for backward."""
    batch, arm = make_batch(BATCH, 224, seed=0), make_sparse(model, seed=0)
    alive = [*arm.model.parameters(), batch.images, batch.mask]

    def step(value: str) -> None:
        os.environ[variable] = value
        arm.step(batch)

    for value in values:
        step(value)
        step(value)
    samples = time_interleaved({v: (lambda v=v: step(v)) for v in values}, rounds)
    results = {}
    for value in values:
        os.environ[variable] = value
        saved = saved_bytes(lambda: arm.forward(batch)[0], alive)
        results[value] = {**summarize(samples[value]), "saved_bytes": saved}
    del os.environ[variable]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=["products", "save", "chunk"], help="parts to measure")
    args = parser.parse_args()
    chunk_bytes = tuple(str(int(mib * 2**20)) for mib in CHUNK_MIB)
    variables = {
        "save": ("CONVNEXTV2_KERNELS_SAVE", schedule.SAVE_POLICIES),
        "chunk": ("CONVNEXTV2_KERNELS_CHUNK_BYTES", chunk_bytes),
    }
    report = {"machine": describe()}
    if "products" in args.only:
        report["products"] = measure_products(args.rounds)
        print(json.dumps(report["products"], indent=1))
    for part in set(variables) & set(args.only):
        report[part] = {m: measure_step(m, *variables[part], args.rounds) for m in MODELS}
    write_report(args.output, report)


if __name__ == "__main__":
    main()
