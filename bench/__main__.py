"""``python -m bench MODE``: one module a mode, imported when it runs; each has a ``--help`` of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from convnextv2_kernels.cli.exit_codes import OK, USAGE, UserError, exit_code

PROG = "python -m bench"
# Mode, the module whose main(argv) runs it, and what it does.
MODES = {
    "ops": ("ops.command", "every op beside dense PyTorch, other engines and its limit, and the host time of a block"),
    "scaling": ("scaling.command", "time and memory by batch, image size and mask ratio"),
    "compare": ("compare", "two result files side by side"),
    "gate": ("gate.command", "the regression gate: bytes, calls and instructions against the committed baseline"),
    "gpu": ("gpu.command", "build, test and measure on a GPU within a time limit"),
    "composed": ("composed", "the fused ops beside the ops that they are composed of"),
    "fused": ("fused", "models of other libraries before and after fuse"),
    "cpu_choices": ("cpu_choices", "the choices the CPU backend makes by default"),
    "resources": ("resources", "registers, shared memory and spills of the CUDA or Triton kernels; needs no GPU"),
    "tables": ("tables", "the tables of README.md and docs/ from the committed results"),
    "training": ("training", "whether training works, on scikit-learn's digits"),
}


def usage() -> str:
    """What the modes are."""
    width = max(map(len, MODES)) + 2
    lines = [f"  {name:<{width}}{about}" for name, (_, about) in MODES.items()]
    return "\n".join([f"usage: {PROG} MODE [options]", "", *lines, "", f"Options of a mode: {PROG} MODE --help"])


def main(argv: Sequence[str]) -> int:
    """Run a mode; return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return OK if argv else USAGE
    mode, *rest = argv
    return exit_code(lambda: run(mode, rest), f"bench {mode}")


def run(mode: str, argv: Sequence[str]) -> int:
    if mode not in MODES:
        raise UserError(f"mode is {mode!r}, expected one of {', '.join(MODES)}", code=USAGE)
    return importlib.import_module(f"bench.{MODES[mode][0]}").main(argv) or OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
