"""Worker: peak memory of one arm's step, alone in its process. Started by :mod:`.memory`."""

from __future__ import annotations

import argparse
import json

import torch

from .. import backends
from .baseline import MEMORY_FORMATS, POINTWISE, Variant
from .device import DEVICES, cuda_peak_bytes, dense_at_its_best
from .memory import PeakUnavailable, step_peak_bytes
from .variants import MASK_RATIO, SPARSE, make_batch, make_dense, make_sparse, served_by


def arguments_for(
    variant: Variant | None,
    model_name: str,
    batch: int,
    img_size: int,
    dtype: str,
    threads: int,
    *,
    device: str = "cpu",
    backend: str = "auto",
    mask_ratio: float = MASK_RATIO,
) -> list[str]:
    """Command line of this module for an arm; variant None is the sparse one, by ``backend``."""
    arguments = ["--model", model_name, "--batch-size", str(batch), "--img-size", str(img_size)]
    arguments += ["--dtype", dtype, "--threads", str(threads), "--device", device]
    arguments += ["--mask-ratio", str(mask_ratio)]
    if variant is None:
        return [*arguments, "--backend", backend]
    arguments += ["--layout", variant.layout, "--pointwise", variant.pointwise]
    return arguments + (["--compiled"] if variant.compiled else [])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--img-size", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--mask-ratio", type=float, required=True)
    parser.add_argument("--backend", choices=backends.NAMES, default="auto")
    parser.add_argument("--layout", choices=list(MEMORY_FORMATS), help=f"absent: {SPARSE}")
    parser.add_argument("--pointwise", choices=POINTWISE)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    batch = make_batch(args.batch_size, args.img_size, 0, dtype, args.device, args.mask_ratio)
    arm = make_sparse(args.model, seed=0, device=args.device)
    if args.layout is not None:
        arm = make_dense(arm, [Variant(args.layout, args.pointwise, args.compiled)])[0]
    else:
        arm = served_by(arm, args.backend)
    try:
        measure = cuda_peak_bytes if args.device == "cuda" else step_peak_bytes
        with dense_at_its_best():
            result = {"bytes": measure(lambda: arm.step(batch))}
    except (PeakUnavailable, torch.OutOfMemoryError) as error:
        result = {"bytes": None, "reason": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
