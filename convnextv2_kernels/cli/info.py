"""``info``: shows what this installation can do, and the recipes of training."""

import argparse
from typing import Any

import convnextv2_kernels

from ..train import recipes
from .exit_codes import OK, user_errors


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "info",
        help="show versions, the machine and which backend runs each op; or the recipes of training",
        description="Show versions, the machine, and which backend runs each op, and why.",
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
    if args.recipes is None:
        print(convnextv2_kernels.info())
        return OK
    with user_errors(ValueError):
        lines = [line for name in args.recipes for line in recipes.described(name)]
    print("\n".join(lines or recipes.overview()))
    return OK
