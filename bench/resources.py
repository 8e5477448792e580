"""Registers, shared memory and spills of every kernel, as the compiler reports them; needs no GPU.

    python -m bench resources cuda             # a table, by nvcc
    python -m bench resources triton --write   # and the committed result, which the documents show

Exit code 1: a kernel spills.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from convnextv2_kernels.cli.exit_codes import FAILURE, OK, UserError

from . import ROOT

# Which kernels, and the module that compiles them: measure_all(), summary(rows), table(report), spills(report), RESULT.
MODULES = {"cuda": "kernel_resources", "triton": "triton_resources"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench resources", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernels", choices=MODULES, help="whose kernels")
    parser.add_argument("--write", action="store_true", help="write the committed result, in bench/results")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the mode; return the exit code."""
    options = build_parser().parse_args(argv)
    module = importlib.import_module(f"bench.{MODULES[options.kernels]}")
    try:
        report = module.summary(module.measure_all())
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    print(module.table(report))
    if options.write:
        module.write(report)
        print(f"written: {module.RESULT.relative_to(ROOT)}")
    return FAILURE if module.spills(report) else OK
