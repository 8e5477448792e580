"""``info``: shows what this installation can do, or the size and the work of a network."""

import argparse
from typing import Any

import convnextv2_kernels

from ..layout import mask_fault
from ..sizes import size_text
from .exit_codes import OK, USAGE, UserError
from .types import PATCH, image_size, model_name, share_or_zero, side

# of a network; the command line has None where they are not given
DEFAULTS = {"img_size": (224, 224), "mask_ratio": 0.6, "patch_size": PATCH}


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="show versions, the machine and which backend runs each op; or parameters and FLOPs of a network",
        description="Show versions, the machine, and which backend runs each op, and why.\n"
        "With --model, show the parameters and FLOPs of a network instead: dense, and packed as FCMAE runs it.",
        epilog=f"example:\n  {prog} info --model tiny --img-size 384",
    )
    add = parser.add_argument
    add("--model", type=model_name, metavar="SIZE", help="of this network, such as atto")
    add("--img-size", type=image_size, metavar="S", help="side, or HxW, of the images in pixels (default: 224)")
    add("--mask-ratio", type=share_or_zero, metavar="R", help="share of hidden patches (default: 0.6)")
    add(
        "--patch-size",
        type=side,
        metavar="P",
        help=f"side of a mask patch in pixels, a multiple of {PATCH} (default: {PATCH})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    if args.model is None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise UserError(f"--{option} is of a network, expected --model as well", USAGE)
        print(convnextv2_kernels.info())
        return OK
    settings = DEFAULTS | given
    size, patch = settings["img_size"], settings["patch_size"]
    if size[0] % patch or size[1] % patch:
        raise UserError(f"--img-size {size_text(size)}: expected multiples of --patch-size {patch}", USAGE)
    grid = size[0] // patch, size[1] // patch
    fault = mask_fault(grid, settings["mask_ratio"], patch, "--mask-ratio", "--img-size")
    if fault is not None:
        raise UserError(fault, USAGE)
    from ..benchmark.model_counts import count_model, describe

    print(describe(count_model(args.model, size, patch, settings["mask_ratio"])))
    return OK
