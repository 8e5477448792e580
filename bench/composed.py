"""The fused ops beside what they are composed of: the same numbers by one op, by two, and by plain PyTorch.

    python -m bench composed --output bench/results/cpu_composed.json

Forward and backward of ``layer_norm_grn`` and ``gathered_pointwise_mlp`` on the visible rows of a batch at every stage:
by the op; by this library's own ops one after the other; by plain PyTorch on the same rows, eager and compiled. Results
are compared first; a copy of the second spelling is the control.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convnextv2_kernels import PatchLayout, ops, random_mask
from convnextv2_kernels.benchmark import allocator, results
from convnextv2_kernels.benchmark.memory import saved_bytes
from convnextv2_kernels.benchmark.timing import Control, summarize, time_interleaved
from convnextv2_kernels.cli.types import positive_int

BATCH, GRID = 8, (7, 7)
OURS, COMPOSED, EAGER, COMPILED, COPY = "one op", "op by op", "PyTorch", "PyTorch, compiled", "copy"
SHAPES = tuple((side, width << stage) for width in (40, 96) for stage, side in enumerate((8, 4, 2, 1)))
EPS = 1e-6
SAMPLE_SECONDS = 0.02  # a sample is as many calls in a row as fill this, so that a neighbour's caches cost nothing
Op = Callable[..., Tensor]


def _grn(h: Tensor, gamma: Tensor, beta: Tensor, images: int) -> Tensor:
    """GRN of equal shares of the rows, as plain PyTorch is fastest at it."""
    h = h.view(images, -1, h.shape[-1])
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return (h * (1 + gamma * (norm / (norm.mean(-1, keepdim=True) + EPS)))).add_(beta)


def norm_grn_variants(layout: PatchLayout) -> dict[str, Op]:
    """``f(x [P, s, s, C], ln_weight, ln_bias, gamma, beta)``."""
    images = layout.num_images

    def composed(x, w, b, gamma, beta):
        return ops.global_response_norm(ops.layer_norm(x, w, b), gamma, beta, layout)

    def plain(x, w, b, gamma, beta):
        return _grn(F.layer_norm(x, w.shape, w, b, EPS), gamma, beta, images).view(x.shape)

    def ours(x, w, b, gamma, beta):
        return ops.layer_norm_grn(x, w, b, gamma, beta, layout)

    return {OURS: ours, COMPOSED: composed, EAGER: plain}


def gathered_variants(layout: PatchLayout, normalized: bool) -> dict[str, Op]:
    """``f(x [N, H, W, C], w1, b1, gamma, beta, w2, b2, ln_weight, ln_bias)``; the norm is left out unless asked for."""
    images, (rows, columns) = layout.num_images, layout.grid
    where = layout.patch_of_slot.long()
    image, patch = where // (rows * columns), where % (rows * columns)
    row, column = patch // columns, patch % columns

    def gather(x):
        side = x.shape[1] // rows
        return x.view(images, rows, side, columns, side, -1)[image, row, :, column]

    def composed(x, *parameters):
        *mlp, lw, lb = parameters
        y = ops.gather_patches(x, layout)
        y = ops.layer_norm(y, lw, lb) if normalized else y
        return ops.pointwise_mlp(y, *mlp, layout)

    def plain(x, *parameters):
        w1, b1, gamma, beta, w2, b2, lw, lb = parameters
        y = gather(x)
        y = F.layer_norm(y, lw.shape, lw, lb, EPS) if normalized else y
        h = _grn(F.gelu(F.linear(y, w1, b1)), gamma, beta, images)
        return F.linear(h, w2, b2).view(y.shape)

    def ours(x, *parameters):
        *mlp, lw, lb = parameters
        norm = {"ln_weight": lw, "ln_bias": lb} if normalized else {}
        return ops.gathered_pointwise_mlp(x, *mlp, layout, **norm)

    return {OURS: ours, COMPOSED: composed, EAGER: plain}


def cases(side: int, width: int) -> dict[str, tuple[dict[str, Op], list[Tensor]]]:
    """Variants and tensors of each op at one stage."""
    generator = torch.Generator().manual_seed(0)
    layout = PatchLayout.from_mask(random_mask(BATCH, GRID, generator=generator))
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    c, h = width, 4 * width
    norm = [1 + 0.1 * draw(c), 0.1 * draw(c)]
    mlp = [draw(h, c) * c**-0.5, 0.1 * draw(h), draw(h), 0.1 * draw(h), draw(c, h) * h**-0.5, 0.1 * draw(c), *norm]
    packed, whole = draw(layout.num_patches, side, side, c), draw(BATCH, GRID[0] * side, GRID[1] * side, c)
    return {
        "layer_norm_grn": (norm_grn_variants(layout), [packed, *norm, draw(c), 0.1 * draw(c)]),
        "gathered_pointwise_mlp": (gathered_variants(layout, False), [whole, *mlp]),
        "gathered_pointwise_mlp with LayerNorm": (gathered_variants(layout, True), [whole, *mlp]),
    }


def measure(name: str, side: int, width: int, rounds: int) -> dict:
    """Milliseconds and saved bytes of each variant of an op, after all were compared."""
    variants, tensors = cases(side, width)[name]
    torch._dynamo.reset()
    variants = {**variants, COMPILED: torch.compile(variants[EAGER], fullgraph=True, dynamic=False)}
    leaves = [t.requires_grad_() for t in tensors]
    cotangent = torch.randn_like(variants[OURS](*leaves))

    def gradients(op: Op) -> list[Tensor]:
        out = op(*leaves)
        return [out, *torch.autograd.grad(out, leaves, cotangent, allow_unused=True)]

    truth = gradients(variants[EAGER])
    for other, op in variants.items():
        for found, expected in zip(gradients(op), truth, strict=True):
            if expected is None:
                continue
            error = (found - expected).norm() / expected.norm()
            if not error < 1e-4:
                raise RuntimeError(f"{name} of width {width} by {other!r} is off by {error:.1e} (relative)")
    start = time.perf_counter()
    gradients(variants[OURS])
    calls = max(1, min(100, int(SAMPLE_SECONDS / (time.perf_counter() - start))))

    def several(op: Op) -> None:
        for _ in range(calls):
            gradients(op)

    steps = {key: functools.partial(several, op) for key, op in variants.items()}
    samples = time_interleaved({**steps, COPY: steps[COMPOSED]}, rounds)
    samples = {key: [seconds / calls for seconds in found] for key, found in samples.items()}
    control = Control.from_samples(COMPOSED, samples[COMPOSED], samples.pop(COPY))
    rows = {}
    for key, seconds in samples.items():
        kept = saved_bytes(lambda op=variants[key]: (op(*leaves) * cotangent).sum(), [*leaves, cotangent])
        rows[key] = {**summarize(seconds), "saved_bytes": kept}
        for leaf in leaves:
            leaf.grad = None
    return {"op": name, "side": side, "width": width, "variants": rows, "control": control.to_json()}


def main(argv: Sequence[str]) -> int:
    """Measure every op at every stage and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench composed", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive_int, default=30, help="timed rounds of all variants (default: 30)")
    parser.add_argument("--threads", type=positive_int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    allocator.hold("constant")
    torch.set_num_threads(args.threads)
    result = results.describe_run("composed", {"batch_size": BATCH, "rounds": args.rounds}, "constant")
    result["rows"] = []
    for side, width in SHAPES:
        for name in cases(side, width):
            row = measure(name, side, width, args.rounds)
            result["rows"].append(row)
            times = ", ".join(f"{key} {found['median_ms']:.2f}" for key, found in row["variants"].items())
            print(f"{name}, C={width} s={side}: ms {times}; control {row['control']['ratio']:.2f}", flush=True)
    results.write(args.output, result)
    return 0
