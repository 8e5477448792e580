"""Worker: peak memory of one variant's step, alone in its process. Started by :mod:`.memory`."""

from __future__ import annotations

import argparse
import json

import torch

from .. import backends
from . import minkowski
from .baseline import MEMORY_FORMATS, POINTWISE, Baseline
from .machine import DEVICES, dense_at_its_best, out_of_memory
from .memory import PeakUnavailable, cuda_peak_bytes, step_peak_bytes
from .variants import DTYPES, SPARSE, Settings, Variant, make_batch, make_dense, make_sparse, run_by


def arguments_for(variant: Variant, model_name: str, settings: Settings, threads: int) -> list[str]:
    """Command line of this module for an eager or a compiled variant."""
    arguments = ["--model", model_name, "--batch-size", str(settings.batch_size), "--img-size", str(settings.img_size)]
    arguments += ["--dtype", settings.dtype, "--threads", str(threads), "--device", settings.device]
    arguments += ["--mask-ratio", str(settings.mask_ratio)]
    if variant.engine is not None:
        return [*arguments, "--engine", variant.engine]
    if variant.baseline is None:
        return [*arguments, "--backend", variant.backend or backends.forced()]
    arguments += ["--layout", variant.baseline.layout, "--pointwise", variant.baseline.pointwise]
    return arguments + (["--compiled"] if variant.execution == "compile" else [])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--mask-ratio", type=float, required=True)
    parser.add_argument("--backend", choices=backends.NAMES, default="auto")
    parser.add_argument("--layout", choices=list(MEMORY_FORMATS), help=f"absent: {SPARSE}")
    parser.add_argument("--pointwise", choices=POINTWISE)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--engine", choices=(minkowski.PACKAGE,))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch = make_batch(args.batch_size, args.img_size, 0, DTYPES[args.dtype], args.device, args.mask_ratio)
    variant = make_sparse(args.model, seed=0, device=args.device)
    if args.layout is not None:
        execution = "compile" if args.compiled else "eager"
        (variant,) = make_dense(variant, [Baseline(args.layout, args.pointwise)], execution)
    elif args.engine is not None:
        variant = minkowski.unchecked(variant)
    else:
        variant = run_by(variant, args.backend)
    try:
        measure = cuda_peak_bytes if args.device == "cuda" else step_peak_bytes
        with dense_at_its_best():
            result = {"bytes": measure(lambda: variant.step(batch))}
    except (PeakUnavailable, RuntimeError) as error:
        if not isinstance(error, PeakUnavailable) and not out_of_memory(error):
            raise
        result = {"bytes": None, "reason": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
