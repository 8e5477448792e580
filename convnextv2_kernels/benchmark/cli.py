"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..models import CONFIGS
from . import machine, report
from .gate import GateError
from .masked_dense import PATCH
from .op_bench import measure_ops
from .options import DTYPES, Budget, Options
from .step import measure_step

PROG = "python -m convnextv2_kernels bench"
PREFIX = "convnextv2_"
QUICK = {"models": (PREFIX + "atto",), "batch_size": 2, "repeats": 3, "compile": False}
# Of the time that is left when a model's turn comes, where ops follow.
STEP_SHARE = 0.6


def build_parser() -> argparse.ArgumentParser:
    """Parser of the benchmark's options; absent ones are None, so that --quick can fill them."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Measure the FCMAE training step and each op against masked dense PyTorch, "
        "after checking that both compute the same.",
        epilog="Writes one JSON file and one PNG to --output and prints tables. Exit code 1: the "
        "results disagree, and nothing was timed.",
    )
    sizes = ", ".join(name.removeprefix(PREFIX) for name in CONFIGS)
    names = " ".join(name.removeprefix(PREFIX) for name in default.models)
    parser.add_argument(
        "--models",
        nargs="+",
        type=_model,
        metavar="SIZE",
        help=f"of {sizes} (default: {names})",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help=f"images per step (default: {default.batch_size})",
    )
    parser.add_argument(
        "--img-size",
        type=_image_size,
        metavar="S",
        help=f"side of the images in pixels, a multiple of {PATCH} (default: {default.img_size})",
    )
    parser.add_argument(
        "--repeats",
        type=_positive,
        metavar="N",
        help=f"timed rounds; each runs every arm once (default: {default.repeats})",
    )
    parser.add_argument(
        "--ops",
        action=argparse.BooleanOptionalAction,
        help="also measure each op (default: yes)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also measure masked dense PyTorch under torch.compile (default: yes)",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help=f"bfloat16: CPU autocast on both sides (default: {default.dtype})",
    )
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="of PyTorch (default: its own choice)"
    )
    parser.add_argument("--seed", type=int, help=f"of weights and inputs (default: {default.seed})")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for the results (default: {default.output})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under a minute: atto, batch 2, 3 repeats, nothing compiled, unless told otherwise",
    )
    parser.add_argument(
        "--time-budget",
        type=_seconds,
        metavar="SECONDS",
        help="stop starting new measurements after this time; at least three rounds of the step "
        "are always timed, and what was skipped is named (default: none)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _image_size(text: str) -> int:
    size = _positive(text)
    if size % PATCH:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {PATCH}")
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _model(text: str) -> str:
    name = text if text.startswith(PREFIX) else PREFIX + text
    if name not in CONFIGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(CONFIGS)}")
    return name


def parse_options(argv: Sequence[str]) -> Options:
    """Options of a command line; exits with code 2 and one sentence on bad input."""
    given = {k: v for k, v in vars(build_parser().parse_args(argv)).items() if v is not None}
    if given["quick"]:
        given = {**QUICK, **given}
    if "models" in given:
        given["models"] = tuple(dict.fromkeys(given["models"]))
    return Options(**given)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code: 0, 1 (correctness gate red) or 2 (bad input)."""
    options = parse_options(argv)
    threads = torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return _run(options)
    except GateError as error:
        print(f"correctness gate: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)


def _run(options: Options) -> int:
    try:
        # Before hours of measuring, not after.
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--output {options.output} cannot be used as a folder: {error}", file=sys.stderr)
        return 2
    draw = importlib.util.find_spec("matplotlib") is not None
    console, progress = report.make_console(), report.make_console(stderr=True)
    began = time.perf_counter()

    def log(message: str) -> None:
        progress.print(f"[{time.perf_counter() - began:6.1f} s] {message}", markup=False)

    parameters = {**dataclasses.asdict(options), "output": None}
    parameters = {key: value for key, value in parameters.items() if value is not None}
    result: dict = {"machine": machine.describe(), "parameters": parameters, "step": [], "ops": {}}
    _warn_if_busy(log, result["machine"])
    budget = Budget(options.time_budget)
    for done, model in enumerate(options.models):
        turn = budget.part(1 / (len(options.models) - done))
        step_budget = turn.part(STEP_SHARE) if options.ops else turn
        step = measure_step(model, options, step_budget, log)
        ops = measure_ops(model, options, turn, log) if options.ops else None
        report.print_step(console, step, parameters, result["machine"]["threads"])
        result["step"].append(step)
        if ops is not None:
            report.print_ops(console, model, ops)
            result["ops"][model] = ops
    result["seconds"] = round(time.perf_counter() - began, 1)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = options.output / f"bench-{stamp}.json"
    report.write_report(path, result)
    console.print(f"Results: {path}", soft_wrap=True)
    if draw:
        from .plot import save_plot

        picture = path.with_suffix(".png")
        save_plot(picture, result["step"], parameters, result["machine"])
        console.print(f"Picture: {picture}", soft_wrap=True)
    else:
        console.print("No picture: matplotlib is not installed (pip install matplotlib).")
    return 0


def _warn_if_busy(log, description: dict) -> None:
    load = description["load_average"]
    cores = description["cores"]
    if load is not None and cores and load[0] > 0.5 * cores:
        log(f"load average is {load[0]:.1f} on {cores} cores: other programs will disturb timing")
