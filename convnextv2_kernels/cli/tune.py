"""``tune``: measures on this GPU which GEMMs of the MLP Triton should fuse, and saves the result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .. import backends
from ..backends import triton
from ..layout import num_kept
from ..sizes import get_config
from .exit_codes import OK, UserError, printing_is_optional, user_errors
from .types import PATCH, image_size, positive_int, share

STEM = 4
DECODER = 512  # width of FCMAE's decoder


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "tune",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="measure on this GPU which GEMMs Triton should fuse, and save the result",
        description=(
            "Measure on this GPU, for the MLPs of a model, whether GEMMs fused in Triton or the vendor's (cuBLAS) are\n"
            "faster, and in which tiles. Later processes on this machine use the result; without it a table that\n"
            "comes with this package decides. Takes minutes, most of them compilation."
        ),
        epilog=(
            "examples:\n"
            f"  {prog} tune --model convnextv2_tiny --batch-size 256\n"
            f"  {prog} tune --model convnextv2_base --batch-size 64 --dense"
        ),
    )
    parser.add_argument(
        "--model", nargs="+", default=["convnextv2_tiny"], metavar="NAME", help="models (default: convnextv2_tiny)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="B", help="images (default: 64)")
    parser.add_argument(
        "--img-size",
        type=image_size,
        default=(224, 224),
        metavar="S|HxW",
        help="pixels, multiples of 32 (default: 224)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--mask-ratio", type=share, default=0.6, metavar="R", help="hidden share in pre-training (default: 0.6)"
    )
    kind.add_argument("--dense", action="store_true", help="training on whole images instead")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the GEMMs (default: bfloat16)",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure, but save nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, and print what was found for each shape."""
    if reason := unavailable():
        raise UserError(reason)
    if not args.dry_run:
        printing_is_optional()
    ratio = None if args.dense else args.mask_ratio
    with user_errors(OSError, ValueError, RuntimeError):
        shapes = mlp_shapes(args.model, args.img_size, ratio, getattr(torch, args.dtype))
        tune(shapes, args.batch_size, save=not args.dry_run)
    return OK


def mlp_shapes(
    models: Iterable[str], image_size: tuple[int, int], mask_ratio: float | None, dtype: torch.dtype
) -> list:
    """Shapes of the MLPs of models, stage by stage, without repetition.

    ``mask_ratio`` as in pre-training, where image sides are multiples of 32, with the decoder's MLP over all patches;
    None for dense training."""
    from ..backends.triton.plans import Shape

    height, width = image_size
    found: dict[Shape, None] = {}
    for model in models:
        for stage, channels in enumerate(get_config(model).dims):
            stride = STEM << stage
            rows = (height // stride) * (width // stride)
            if mask_ratio is not None:
                rows = num_kept((height // PATCH, width // PATCH), mask_ratio) * (PATCH // stride) ** 2
            found[Shape(dtype, channels, 4 * channels, channels, rows)] = None
    if mask_ratio is not None:
        found[Shape(dtype, DECODER, 4 * DECODER, DECODER, (height // PATCH) * (width // PATCH))] = None
    return list(found)


def unavailable() -> str | None:
    """Why nothing can be tuned here, or None."""
    if not triton.INTERPRETED and not torch.cuda.is_available():
        return "tune needs a GPU, and PyTorch sees none on this machine"
    return backends.unsupported_reason("triton", triton.DEVICE, torch.float32)


def tune(shapes: Sequence, images: int, say: Callable[[str], None] = print, save: bool = True, **options) -> dict:
    """Measure shapes at this number of images; with ``save``, write their plans, which later runs use at any number.

    Returns ``{shape: Finding}``.

    ``options`` go to ``backends.triton.tune.find``. Raises RuntimeError where Triton cannot run."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    from ..backends.triton import plans
    from ..backends.triton.tune import find

    if save and (fault := plans.fault()) is not None:
        say(f"the plans measured before cannot be used and will be replaced: {fault}")
    serving = backends.automatic(triton.DEVICE, (shapes[0].dtype,)) if shapes else "triton"
    backend = backends.get("triton" if triton.INTERPRETED else serving)
    findings = {}
    for shape in shapes:
        findings[shape] = find(shape, images, backend, triton.DEVICE, **options)
        say(describe(shape, images, findings[shape]))
    if save and findings:
        say(f"written to {plans.write({shape: finding.plan for shape, finding in findings.items()})}")
    return findings


def describe(shape, images: int, finding) -> str:
    """One line for people: the shape, microseconds of each way forward and backward, and what was chosen."""

    def ways(times: dict[str, float], chosen: str) -> str:
        return ", ".join(f"{'*' if way == chosen else ''}{way} {1e6 * t:.0f} us" for way, t in times.items())

    plan = finding.plan
    forward = "fused" if plan.forward_fused else "library"
    backward = "fused" if plan.backward_fused else "weight" if plan.weight else "library"
    return (
        f"C = {shape.width:<5} {images} images of {shape.rows_each:<5} rows   forward: "
        f"{ways(finding.forward, forward)};  backward: {ways(finding.backward, backward)}"
    )
