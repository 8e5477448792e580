"""``bench``: has parsers of its own, one for each mode, and gets its arguments as they are."""

from collections.abc import Sequence
from typing import Any


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand, for the list of commands only."""
    commands.add_parser("bench", add_help=False, help="measure speed and memory against masked dense PyTorch")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    from ..benchmark import main as bench_main

    return bench_main(argv) or 0
