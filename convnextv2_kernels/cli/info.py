"""``info``: shows what this installation can do, the size and the work of a network, or the recipes of training."""

import argparse
from typing import Any

import convnextv2_kernels

from ..layout import mask_fault
from ..sizes import size_text
from ..train import recipes
from .exit_codes import OK, USAGE, UserError, user_errors
from .types import PATCH, any_model_name, image_size, share_or_zero, side

# of a network; the command line has None where they are not given
DEFAULTS = {"img_size": (224, 224), "mask_ratio": 0.6, "patch_size": PATCH}


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="show versions, the machine and which backend runs each op; parameters and FLOPs of a network; "
        "or the recipes of training",
        description="Show versions, the machine, and which backend runs each op, and why.\n"
        "With --model, show the parameters and FLOPs of a network instead: dense, and packed as FCMAE runs it.\n"
        "With --recipes, show the recipes of training instead.",
        epilog=f"example:\n  {prog} info --model tiny --img-size 384",
    )
    add = parser.add_argument
    add("--model", type=any_model_name, metavar="SIZE", help="of this network, such as atto, or convnext_tiny for V1")
    add("--img-size", type=image_size, metavar="S", help="side, or HxW, of the images in pixels (default: 224)")
    add("--mask-ratio", type=share_or_zero, metavar="R", help="share of hidden patches (default: 0.6)")
    add(
        "--patch-size",
        type=side,
        metavar="P",
        help=f"side of a mask patch in pixels, a multiple of {PATCH} (default: {PATCH})",
    )
    parser.add_argument(
        "--recipes",
        nargs="*",
        metavar="NAME",
        help="show all recipes of pretrain, finetune, COCO (A.3) and ADE20K (A.4) with their sources instead; with "
        "names: every value of these, and where it is from",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    if args.recipes is not None:
        if args.model is not None:
            raise UserError("--model and --recipes are two questions; give one of them", USAGE)
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} is of a network, --recipes is not", USAGE)
        with user_errors(ValueError):
            lines = [line for name in args.recipes for line in recipes.described(name)]
        print("\n".join(lines or recipes.overview()))
        return OK
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
