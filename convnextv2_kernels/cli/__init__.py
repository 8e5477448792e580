"""The command line: ``info``, ``bench``, ``tune``, ``pretrain``, ``finetune``, ``analyze`` and ``convert``.

One module a command: ``add_parser`` adds its options, ``run`` carries it out. What a command needs beyond the kernels
(training, analyses, the benchmark, and with them NumPy, Pillow or rich) is imported when it runs.
"""

import argparse
import sys
from collections.abc import Sequence

from .._interrupts import raised_signals
from . import analyze, bench, convert, finetune, info, pretrain, tune
from .exit_codes import exit_code

PROG = "python -m convnextv2_kernels"
COMMANDS = (info, bench, tune, pretrain, finetune, analyze, convert)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Exact sparse FCMAE pre-training of ConvNeXt V2, and of V1: show what this installation "
        "can do, measure it, train, look into what was trained, and convert checkpoints.",
        epilog=f"New here? Try '{PROG} pretrain --demo'. More on a command: COMMAND --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands, PROG)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(words[: 2 if words[:1] == ["analyze"] else 1])
    return exit_code(lambda: _run(words), command)


def _run(words: list[str]) -> int:
    with raised_signals():
        if words[:1] == ["bench"]:
            return bench.main(words[1:])
        args = build_parser().parse_args(words)
        args.words = (*PROG.split(), *words)
        return args.run(args)
