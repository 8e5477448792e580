"""Measures the choices the CPU backend makes by default, so that docs/kernels/mlp.md states them from a file.

    python -m bench cpu_choices --output bench/results/cpu_choices.json

Matrix products by library over the shapes of FCMAE's stages; the step under each policy of what is kept for backward;
the step under several chunk sizes. Interleaved medians, as everywhere. On an Intel processor, where the backend itself
mixes libraries, ``CONVNEXTV2_KERNELS_CPU_GEMM=onednn`` and ``--only products`` set one against the other.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from convnextv2_kernels.backends import cpu_gemm
from convnextv2_kernels.benchmark import allocator, results
from convnextv2_kernels.benchmark.memory import saved_bytes
from convnextv2_kernels.benchmark.timing import Control, summarize, time_interleaved
from convnextv2_kernels.benchmark.variants import make_batch, make_sparse
from convnextv2_kernels.cli.types import positive_int
from convnextv2_kernels.settings import SAVE_POLICIES, override

PARTS = ("products", "save", "chunk")
COPY = "copy"  # the control
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
            samples = time_interleaved({**calls, COPY: calls["mm"]}, rounds)
            control = Control.from_samples("mm", samples["mm"], samples.pop(COPY))
            rates = {k: round(flops / summarize(v)["median_ms"] * 1e-6, 1) for k, v in samples.items()}
            rows.append({"rows": m, "width": c, "gflops": rates, "control": control.to_json()})
    return rows


def measure_step(model: str, setting: str, values: Sequence, rounds: int) -> dict:
    """The step with a setting at each value: milliseconds and bytes saved for backward; the first value is timed twice,
    which is the control."""
    batch, variant = make_batch(BATCH, 224, seed=0), make_sparse(model, seed=0)
    alive = [*variant.model.parameters(), batch.images, batch.mask]

    def step(value) -> None:
        with override(**{setting: value}):
            variant.step(batch)

    for value in values:
        step(value)
        step(value)
    steps = {str(value): functools.partial(step, value) for value in values}
    first = str(values[0])
    samples = time_interleaved({**steps, COPY: steps[first]}, rounds)
    control = Control.from_samples(first, samples[first], samples.pop(COPY))
    found = {}
    for value in values:
        with override(**{setting: value}):
            saved = saved_bytes(lambda: variant.forward(batch)[0], alive)
        found[str(value)] = {**summarize(samples[str(value)]), "saved_bytes": saved}
    return {"variants": found, "control": control.to_json()}


def main(argv: Sequence[str]) -> int:
    """Run the mode; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench cpu_choices", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=positive_int, default=9)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    args = parser.parse_args(argv)
    allocator.hold("constant")
    choices = {"save": ("save", SAVE_POLICIES), "chunk": ("chunk_bytes", [int(mib * 2**20) for mib in CHUNK_MIB])}
    report = results.describe_run("cpu_choices", {"rounds": args.rounds}, "constant")
    if "products" in args.only:
        report["products"] = measure_products(args.rounds)
        print(json.dumps(report["products"], indent=1))
    for part in (part for part in choices if part in args.only):
        report[part] = {model: measure_step(model, *choices[part], args.rounds) for model in MODELS}
    results.write(args.output, report)
    return 0
