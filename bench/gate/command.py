"""Regression gate on quantities that do not depend on how fast or how busy the machine is.

    python -m bench gate             # compare with bench/results/regression_gate.json; exit 1 if worse
    python -m bench gate --update    # measure, and rewrite that file

Bytes saved for backward, bytes asked of PyTorch's allocator and numbers of dispatched operators, of the training step
of whole models and of every op; Python calls and dispatches of a block of one site; executed instructions of every C++
CPU kernel, counted by callgrind where valgrind is installed. One thread; half a minute, plus the build of the C++
kernels if they are not built. Never a time.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from convnextv2_kernels._files import read_json
from convnextv2_kernels.benchmark import machine, results
from convnextv2_kernels.cli.exit_codes import USAGE, UserError
from convnextv2_kernels.errors import FileError

from .. import RESULTS, ROOT
from . import host, instructions, operators, steps
from .judge import RULES, SECTIONS, flat, judge
from .settings import fixed

BASELINE = RESULTS / "regression_gate.json"
KIND = "regression_gate"
UPDATE = "python -m bench gate --update"


class BadInput(UserError):
    """Exit code 2."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(f"regression gate: {message}", code)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gate", description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="(default: the committed one)")
    parser.add_argument("--update", action="store_true", help="write what is found to the baseline")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write what is found, for python -m bench compare"
    )
    parser.add_argument(
        "--build",
        type=Path,
        default=ROOT / "build" / "cmake",
        metavar="DIR",
        help="CMake's build folder, of an optimized build (default: build/cmake)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--require-instructions", action="store_true", help="fail where instructions cannot be counted (no valgrind)"
    )
    which.add_argument("--skip-instructions", action="store_true", help="do not count instructions")
    return parser


def read_baseline(path: Path) -> dict:
    """The committed result; raises BadInput with one sentence when it is not one."""
    try:
        result = results.escaped(read_json(path))
    except OSError as error:
        raise BadInput(f"--baseline {path} cannot be read: {error.strerror}; {UPDATE} writes it") from error
    except FileError as error:
        raise BadInput(f"--baseline {error}") from error
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise BadInput(f"--baseline {path} is not a result of this gate, expected kind {KIND!r}")
    missing = [name for name in ("machine", "software", "parameters", *SECTIONS) if not result.get(name)]
    if missing:
        raise BadInput(f"--baseline {path} lacks {', '.join(missing)}; {UPDATE} rewrites it")
    for key, number in flat(result).items():
        if key.split(" / ")[-1] not in RULES or isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise BadInput(f"--baseline {path} has {number!r} for {key!r}, expected a known quantity and a count")
    return result


def parameters() -> dict:
    """What is measured; another choice is another baseline."""
    return {
        "batch_size": steps.BATCH,
        "img_size": steps.IMG_SIZE,
        "dtype": "float32",
        "products": "mm",
        "op_side": operators.SIDE,
        "op_width": operators.WIDTH,
    }


def measure(args: argparse.Namespace, log) -> tuple[dict, dict[str, str]]:
    """The result, and for sections that were not measured the reason."""
    reason = machine.unsupported_reason("cpu", "cpu", torch.float32)
    if reason is not None:
        raise BadInput(f"the gate counts what the cpu backend does, but {reason}")
    with fixed():
        result = {
            "format": results.FORMAT,
            "kind": KIND,
            "machine": machine.describe(),
            "software": {"torch": torch.__version__, "python": platform.python_version()},
            "parameters": parameters(),
            "step": steps.measure(steps.SIZES, log),
            "op": operators.measure(log),
            "host": host.measure(log),
        }
    try:
        if args.skip_instructions:
            raise instructions.Unavailable("--skip-instructions was given")
        instructions.valgrind_version()  # before minutes of building
        log("building the kernels' driver")
        driver = instructions.build(args.build)
        log("instructions of every kernel")
        facts, sections = instructions.count(driver)
    except instructions.Unavailable as error:
        if args.require_instructions:
            raise BadInput(f"--require-instructions was given, but {error}") from error
        return result, dict.fromkeys(instructions.SECTIONS.values(), str(error))
    result["software"] |= facts
    return {**result, **sections}, {}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 nothing worse, 1 something worse, 2 bad input."""
    args = build_parser().parse_args(argv)
    began = time.perf_counter()

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        return _run(args, log)
    except (RuntimeError, OSError) as error:
        raise BadInput(str(error)) from error


def _run(args: argparse.Namespace, log) -> int:
    baseline = None if args.update else read_baseline(args.baseline)
    if baseline is not None and baseline["parameters"] != parameters():
        raise BadInput(f"--baseline is of {baseline['parameters']}, the gate measures {parameters()}; run {UPDATE}")
    found, left_out = measure(args, log)
    if args.output is not None:
        results.write(args.output, found)
    if baseline is None:
        if left_out:
            reasons = ", ".join(sorted(set(left_out.values())))
            raise BadInput(f"--update would drop the instructions from the baseline; they were not counted: {reasons}")
        results.write(args.baseline, found)
        print(f"regression gate: {len(flat(found))} quantities written to {args.baseline.name}")
        return 0
    verdict = judge(baseline, found, left_out)
    if args.require_instructions and not verdict.compared_in("instructions"):
        verdict.worse.append(f"no instruction count could be compared; run {UPDATE} with this compiler and commit it")
    for note in verdict.notes:
        print(note)
    for sentence in verdict.better:
        print(f"better than the baseline: {sentence}")
    for sentence in verdict.worse:
        print(f"WORSE: {sentence}")
    print(
        f"regression gate: {verdict.compared} quantities compared, {len(verdict.worse)} worse or missing, "
        f"{len(verdict.better)} better" + (f" (keep it: {UPDATE})" if verdict.better else "")
    )
    return 1 if verdict.worse else 0
