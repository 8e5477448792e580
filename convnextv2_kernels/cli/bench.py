"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.ops.measure import measure_ops

from ..benchmark import arguments, machine, report
from ..benchmark.baseline import PATCH
from ..benchmark.device import DEVICES, default_device, dense_at_its_best, no_gpu
from ..benchmark.exits import exit_code
from ..benchmark.options import DTYPES, Budget, Options
from ..benchmark.step import measure_step
from ..models import CONFIGS

PROG = "python -m convnextv2_kernels bench"
QUICK = {"models": ("convnextv2_atto",), "batch_size": 2, "repeats": 3, "compile": False}
# Flag, the module whose main() runs the mode, and what it does.
MODES = {
    "--figure6": ("figure6_cli", "the paper's Figure 6: every size against masked dense PyTorch"),
    "--scaling": ("scaling_cli", "time and memory by batch, image size and mask ratio"),
    "--compare": ("compare", "two result files side by side"),
}
# Of the time that is left when a model's turn comes, where ops follow.
STEP_SHARE = 0.6


def build_parser() -> argparse.ArgumentParser:
    """Parser of the benchmark's options; absent ones are None, so that --quick can fill them."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Measure the FCMAE training step and each op against masked dense PyTorch, "
        "after checking that both compute the same.",
        epilog="Writes one JSON file and its pictures to --output and prints tables. Exit code 1: the "
        "results disagree, and nothing was timed. Other modes, each with a --help of its own: "
        + "; ".join(f"{flag}, {what}" for flag, (_, what) in MODES.items())
        + ".",
    )
    sizes = ", ".join(arguments.short(name) for name in CONFIGS)
    names = " ".join(arguments.short(name) for name in default.models)
    parser.add_argument(
        "--models", nargs="+", type=arguments.model, metavar="SIZE", help=f"of {sizes} (default: {names})"
    )
    parser.add_argument(
        "--batch-size", type=arguments.positive, metavar="N", help=f"images per step (default: {default.batch_size})"
    )
    parser.add_argument(
        "--img-size",
        type=arguments.image_size,
        metavar="S",
        help=f"side of the images in pixels, a multiple of {PATCH} (default: {default.img_size})",
    )
    parser.add_argument(
        "--repeats",
        type=arguments.positive,
        metavar="N",
        help=f"timed rounds; each runs every arm once (default: {default.repeats})",
    )
    parser.add_argument(
        "--ops",
        action=argparse.BooleanOptionalAction,
        help="--ops: only each op, beside what the machine could do at most; --no-ops: only the step (default: both)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also measure masked dense PyTorch under torch.compile (default: yes)",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help=f"bfloat16: autocast on both sides (default: {default.dtype})"
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--threads", type=arguments.positive, metavar="N", help="of PyTorch (default: its own choice)")
    parser.add_argument("--seed", type=int, help=f"of weights and inputs (default: {default.seed})")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for the results (default: {default.output})"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under a minute: atto, batch 2, 3 repeats, nothing compiled, unless told otherwise",
    )
    parser.add_argument(
        "--time-budget",
        type=arguments.seconds,
        metavar="SECONDS",
        help="stop starting new measurements after this time; at least three rounds of the step "
        "are always timed, and what was skipped is named (default: none)",
    )
    return parser


def parse_options(argv: Sequence[str]) -> Options:
    """Options of a command line; exits with code 2 and one sentence on bad input."""
    given = {k: v for k, v in vars(build_parser().parse_args(argv)).items() if v is not None}
    if given["quick"]:
        given = {**QUICK, **given}
    if "models" in given:
        given["models"] = tuple(dict.fromkeys(given["models"]))
    # --ops alone asks for them and nothing else
    given.setdefault("device", default_device())
    return Options(**given, step=not given.get("ops", False))


def main(argv: Sequence[str]) -> int:
    """Run the benchmark or another of its modes; returns the exit code.

    0, 1 (correctness gate red) or 2 (bad input); the modes' own may differ.
    """
    modes = [argument for argument in argv if argument in MODES]
    if len(modes) > 1:
        print(f"{' and '.join(modes)} exclude each other, expected one mode", file=sys.stderr)
        return 2
    if modes:
        module = importlib.import_module(f".{MODES[modes[0]][0]}", __package__)
        return module.main([argument for argument in argv if argument != modes[0]])
    options = parse_options(argv)
    return exit_code(lambda: _tuned(options), options.threads, no_gpu(options.device))


def _tuned(options: Options) -> int:
    with dense_at_its_best():
        return _run(options)


def _run(options: Options) -> int:  # noqa: C901  (to be split)
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
    result: dict = {"kind": "bench", "machine": machine.describe(options.device), "parameters": parameters}
    result |= {"step": [], "ops": {}}
    busy = machine.why_busy(result["machine"])
    if busy:
        log(busy)
    budget = Budget(options.time_budget)
    for done, model in enumerate(options.models):
        turn = budget.part(1 / (len(options.models) - done))
        step_budget = turn.part(STEP_SHARE) if options.ops else turn
        if options.step:
            step = measure_step(model, options, step_budget, log)
            result["step"].append(step)
        if options.ops:
            result["ops"][model] = measure_ops(model, options, turn, log)
        if options.step:
            report.print_step(console, step, parameters, result["machine"]["threads"])
        if options.ops:
            report.print_ops(console, model, result["ops"][model])
    result["seconds"] = round(time.perf_counter() - began, 1)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = options.output / f"bench-{stamp}.json"
    report.write_report(path, result)
    console.print(f"Results: {path}", soft_wrap=True)
    if draw:
        from bench.ops.plot import save_limits

        from ..benchmark.plot import save_plot

        pictures = []
        if options.step:
            pictures.append(path.with_suffix(".png"))
            save_plot(pictures[-1], result)
        if any(ops["rows"] for ops in result["ops"].values()):
            pictures.append(path.with_name(f"{path.stem}-ops.png"))
            save_limits(pictures[-1], result)
        for picture in pictures:
            console.print(f"Picture: {picture}", soft_wrap=True)
    else:
        console.print("No picture: matplotlib is not installed (pip install matplotlib).")
    return 0
