"""Worker: peak memory of one arm's step, alone in its process. Started by :mod:`.memory`."""

from __future__ import annotations

import argparse
import json

import torch

from .arms import SPARSE, make_batch, make_dense, make_sparse
from .masked_dense import MEMORY_FORMATS, POINTWISE, Variant
from .memory import PeakUnavailable, step_peak_bytes


def arguments_for(
    variant: Variant | None, model_name: str, batch: int, img_size: int, dtype: str, threads: int
) -> list[str]:
    """Command line of this module for an arm; None is the sparse one."""
    arguments = ["--model", model_name, "--batch-size", str(batch), "--img-size", str(img_size)]
    arguments += ["--dtype", dtype, "--threads", str(threads)]
    if variant is not None:
        arguments += ["--layout", variant.layout, "--pointwise", variant.pointwise]
        arguments += ["--compiled"] if variant.compiled else []
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--layout", choices=list(MEMORY_FORMATS), help=f"absent: {SPARSE}")
    parser.add_argument("--pointwise", choices=POINTWISE)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch = make_batch(args.batch_size, args.img_size, seed=0, dtype=getattr(torch, args.dtype))
    arm = make_sparse(args.model, seed=0)
    if args.layout is not None:
        arm = make_dense(arm, [Variant(args.layout, args.pointwise, args.compiled)])[0]
    try:
        result = {"bytes": step_peak_bytes(lambda: arm.step(batch))}
    except PeakUnavailable as error:
        result = {"bytes": None, "reason": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
