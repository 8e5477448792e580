"""``info``: shows what this installation can do."""

import argparse
from typing import Any

import convnextv2_kernels

from .exit_codes import OK


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "info",
        help="show versions, the machine and which backend runs each op",
        description="Show versions, the machine, and which backend runs each op, and why.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    print(convnextv2_kernels.info())
    return OK
