"""``bench``: the training step against masked dense PyTorch, and with ``--figure6`` the paper's Figure 6."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..layout import mask_fault, num_kept
from ..sizes import V2_NAMES
from .exit_codes import USAGE, UserError, exit_code, printing_is_optional, require_packages
from .types import PATCH, file_path, model_name, positive_int, seconds, share_or_zero, short_name, side

PROG = "python -m convnextv2_kernels bench"
QUICK = {"models": ("convnextv2_atto",), "batch_size": 2, "repeats": 3, "compile": False}
# What is measured for the library's own development is not part of the package.
MOVED = {"--ops": "ops", "--scaling": "scaling", "--compare": "compare"}
# Figure 6: on a CPU an image takes up to a second; batch 64 is the paper's.
BATCH = {"cpu": 8, "cuda": 64}
REPEATS = {"cpu": 5, "cuda": 20}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
# Seconds of a size grow with its parameters, beside a part that every size takes, as much as these many parameters.
FIXED_COST = 100e6


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand, for the list of commands only."""
    commands.add_parser("bench", add_help=False, help="measure speed and memory against masked dense PyTorch")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code: 0, 1 (results disagree), 2 (bad input) or 130 (interrupted)."""
    return exit_code(lambda: _dispatch(list(argv)), "bench")


def _dispatch(argv: list[str]) -> int:
    for flag, mode in MOVED.items():
        if flag in argv:
            raise UserError(
                f"bench {flag} is now `python -m bench {mode}`, run in a clone of the repository", code=USAGE
            )
    if "--figure6" in argv:
        return _figure6([word for word in argv if word != "--figure6"])
    return _steps(argv)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every timed mode; absent ones are None."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="bfloat16: autocast on both sides (default: %(default)s)")
    add("--threads", type=positive_int, metavar="N", help="of PyTorch (default: its own choice)")
    add("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    add(
        "--allocator",
        choices=("constant", "default", "both"),
        default="constant",
        help="of the C library: constant, large freed blocks stay with the process on all sides; default, as a program "
        "has it that does nothing about it; both, one run after the other, in two files (default: constant)",
    )
    add("--output", type=file_path, default="bench_output", metavar="DIR", help="folder (default: bench_output)")


def build_parser() -> argparse.ArgumentParser:
    """Parser of the benchmark's options; absent ones are None, so that --quick can fill them."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Measure the FCMAE training step against masked dense PyTorch, after checking that both compute "
        "the same, with a baseline against its own copy as the control.",
        epilog="Writes one JSON file and its picture to --output and prints a table. Exit code 1: the results "
        "disagree, and nothing was timed. --figure6, with a --help of its own: the paper's Figure 6, every size "
        "against masked dense PyTorch. Ops, scaling and comparisons: `python -m bench` in a clone of the repository.",
    )
    sizes = ", ".join(short_name(name) for name in V2_NAMES)
    add = parser.add_argument
    add("--models", nargs="+", type=model_name, metavar="SIZE", help=f"of {sizes} (default: atto tiny)")
    add("--batch-size", type=positive_int, metavar="N", help="images per step (default: 8)")
    add("--img-size", type=side, metavar="S", help=f"side in pixels, a multiple of {PATCH} (default: 224)")
    add("--repeats", type=positive_int, metavar="N", help="timed rounds; each runs every variant once (default: 10)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also measure masked dense PyTorch under torch.compile (default: yes)",
    )
    add("--no-ops", action="store_true", help=argparse.SUPPRESS)  # ops are measured elsewhere
    add_common(parser)
    parser.set_defaults(dtype="float32")
    add(
        "--quick",
        action="store_true",
        help="under a minute: atto, batch 2, 3 repeats, nothing compiled, unless told otherwise",
    )
    add(
        "--time-budget",
        type=seconds,
        metavar="SECONDS",
        help="stop starting new measurements after this time; at least three rounds of the step "
        "are always timed, and what was skipped is named (default: none)",
    )
    return parser


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line, defaults filled in; exits with code 2 and one sentence on bad input."""
    args = build_parser().parse_args(argv)
    defaults = {"models": ("convnextv2_atto", "convnextv2_tiny"), "batch_size": 8, "img_size": 224, "repeats": 10}
    for name, value in {**defaults, "compile": True, **(QUICK if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.models = tuple(dict.fromkeys(args.models))
    return args


def each_allocator(choice: str, run: Callable[[str], int]) -> int:
    """Call ``run(mode)`` with the allocator held so; by default first, as constant cannot be taken back."""
    from ..benchmark import allocator

    for mode in ("default", "constant") if choice == "both" else (choice,):
        try:
            allocator.hold(mode)
        except ValueError as error:
            raise UserError(f"--{error}", code=USAGE) from error
        code = run(mode)
        if code:
            return code
    return 0


def suffix(mode: str) -> str:
    """What is added to the name of a file measured with an allocator."""
    return "" if mode == "constant" else "_default_allocator"


def measured(args: argparse.Namespace, run: Callable[[str], int]) -> int:
    """Call ``run`` with each allocator, under the threads asked for; results that disagree become exit code 1."""
    from ..benchmark import machine
    from ..benchmark.correctness import CorrectnessError

    require_packages("bench", ("rich",))
    printing_is_optional()
    reason = machine.no_gpu(args.device)
    if reason:
        raise UserError(reason, code=USAGE)
    try:
        with machine.threads(args.threads):
            return each_allocator(args.allocator, run)
    except CorrectnessError as error:
        raise UserError(f"correctness check: {error}") from error


def require_visible(img_size: int, mask_ratio: float = 0.6) -> None:
    """Raise UserError where no patch would be visible: the encoder would have nothing to do."""
    grid = (img_size // PATCH, img_size // PATCH)
    if not num_kept(grid, mask_ratio):
        raise UserError(str(mask_fault(grid, mask_ratio, PATCH, "--mask-ratio", "--img-size")), code=USAGE)


def make_folder(output: Path) -> None:
    """Before hours of measuring, not after."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be used as a folder: {error}", code=USAGE) from error


def _steps(argv: Sequence[str]) -> int:
    args = parse_options(argv)
    require_visible(args.img_size)
    from ..benchmark import machine

    args.device = args.device or machine.default_device()
    return measured(args, functools.partial(_run_steps, args))


def _run_steps(args: argparse.Namespace, mode: str) -> int:
    from .._progress import Progress
    from ..benchmark import machine, report, results
    from ..benchmark.step import StepSettings, measure_step
    from ..benchmark.timing import Budget

    make_folder(args.output)
    fields = {field.name for field in dataclasses.fields(StepSettings)}
    settings = StepSettings(**{name: value for name, value in vars(args).items() if name in fields})
    parameters = {**dataclasses.asdict(settings), "time_budget": args.time_budget, "quick": args.quick}
    result = results.describe_run("step", parameters, mode, settings.device) | {"step": []}
    console = report.make_console()
    budget = Budget(args.time_budget)
    with (
        machine.dense_at_its_best(),
        Progress("Step", len(settings.models), console=report.make_console(stderr=True), percent=True) as bar,
    ):
        warn_if_busy(result, bar.log)
        for done, model in enumerate(settings.models):
            turn = budget.part(1 / (len(settings.models) - done))
            result["step"].append(measure_step(model, settings, turn, bar.log))
            bar.advance(1)
    report.print_steps(console, result, result["step"])
    path = args.output / f"bench-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}{suffix(mode)}.json"
    results.write(path, result)
    console.print(f"Results: {path}", soft_wrap=True)
    if find_spec("matplotlib") is None:
        console.print("No picture: matplotlib is not installed (pip install matplotlib).")
        return 0
    from ..benchmark.plot import save_steps

    save_steps(path.with_suffix(".png"), result)
    console.print(f"Picture: {path.with_suffix('.png')}", soft_wrap=True)
    return 0


def warn_if_busy(result: dict, say: Callable[[str], None]) -> None:
    """Say that other programs will disturb the times, where they will."""
    from ..benchmark.machine import why_busy

    busy = why_busy(result["machine"])
    if busy:
        say(busy)


def build_figure6_parser() -> argparse.ArgumentParser:
    """Parser of ``--figure6``."""
    parser = argparse.ArgumentParser(
        prog=f"{PROG} --figure6",
        description="Throughput, peak memory and bytes saved for backward of masked pre-training by model size: masked "
        "dense PyTorch, eager and compiled, against every backend of this library, on a GPU also in CUDA graphs on "
        "both sides; the comparison of the paper's Figure 6 (Appendix C). Results are checked against float64 before "
        "anything is timed, and a baseline is timed against its own copy. The paper's sparse engine, "
        "MinkowskiEngine, is measured too where it is installed.",
        epilog="Writes figure6.json, figure6.csv and figure6.png to --output, after every size. Re-running the command "
        "resumes where it was stopped, and measures a size again that was measured with less effort. Exit code 1: "
        "results disagree; that size and those after it were not timed.",
    )
    sizes = ", ".join(short_name(name) for name in V2_NAMES)
    add = parser.add_argument
    add("--models", nargs="+", type=model_name, metavar="SIZE", help=f"of {sizes} (default: all)")
    add("--batch-size", type=positive_int, metavar="N", help="images per step (default: 64, on a CPU 8)")
    add("--img-size", type=side, default=224, metavar="S", help="side in pixels (default: 224)")
    add("--mask-ratio", type=share_or_zero, default=0.6, metavar="R", help="share that is hidden (default: 0.6)")
    add("--repeats", type=positive_int, metavar="N", help="timed rounds of all variants (default: 20, on a CPU 5)")
    yes_or_no = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--compile", help="measure torch.compile (default: yes)", **yes_or_no)
    add("--peak", help="measure peak memory (default: yes)", **yes_or_no)
    add_common(parser)
    add(
        "--time-budget",
        type=seconds,
        metavar="SECONDS",
        help="start no further size after this time; of one, fewer rounds (three at least), no compiled variants or "
        "peaks (default: none)",
    )
    add("--restart", action="store_true", help="begin a new file, dropping the one in --output")
    return parser


def _figure6(argv: Sequence[str]) -> int:
    args = build_figure6_parser().parse_args(argv)
    require_visible(args.img_size, args.mask_ratio)
    from ..benchmark import machine

    device = args.device = args.device or machine.default_device()
    args.models = tuple(dict.fromkeys(args.models or V2_NAMES))
    for name, defaults in (("batch_size", BATCH), ("repeats", REPEATS), ("dtype", DTYPE)):
        setattr(args, name, getattr(args, name) or defaults[device])
    again = "the same command without --restart" if args.restart else "the same command"
    try:
        return measured(args, functools.partial(_run_figure6, args))
    except KeyboardInterrupt as stop:
        message = f"stopped; finished sizes are in {args.output}, {again} measures the others"
        raise KeyboardInterrupt(message) from stop


def _run_figure6(args: argparse.Namespace, mode: str) -> int:
    from .._progress import Progress
    from ..benchmark import figure6, machine, memory, minkowski, report, results
    from ..benchmark.timing import Budget

    fields = {field.name for field in dataclasses.fields(figure6.Figure6Settings)}
    settings = figure6.Figure6Settings(**{name: value for name, value in vars(args).items() if name in fields})
    parameters = dataclasses.asdict(settings)
    models = parameters.pop("models")
    # These may differ from size to size: a large one may do with fewer rounds and without an hour of compiling.
    effort = {name: parameters.pop(name) for name in ("repeats", "compile", "peak")}
    path = args.output / f"figure6{suffix(mode)}.json"
    start = results.describe_run("figure6", parameters, mode, settings.device)
    code = machine.git_commit()
    result = results.resume(path, start, args.restart)
    with results.reading(path):
        sizes = {size["model"]: size for size in result.get("sizes", [])}
        done = [model for model in models if model in sizes and figure6.complete(sizes[model], settings)]
        report.require_steps(result, list(sizes.values()))
        # What was left out before and is not asked for now stays left out.
        before = {model: str(reason) for model, reason in result.get("left_out", {}).items() if model not in models}
    reasons = {model: figure6.left_out(model, settings) for model in models if model not in done}
    waiting = [model for model, reason in reasons.items() if reason is None]
    result["engine"] = minkowski.described()
    result["left_out"] = before | {model: reason for model, reason in reasons.items() if reason}
    budget = Budget(args.time_budget)
    costs = {model: memory.parameter_count(model) + FIXED_COST for model in waiting}
    console, stderr = report.make_console(), report.make_console(stderr=True)
    with Progress("Figure 6", sum(costs.values()), console=stderr, percent=True) as progress:
        warn_if_busy(start, progress.log)
        for model in done:
            other = "" if sizes[model].get("git") == code else ", by other code"
            progress.log(f"{model}: measured before{other}")
        for model, reason in result["left_out"].items():
            progress.log(f"{model}: left out, {reason}")
        for place, model in enumerate(waiting):
            if budget.spent:
                result["left_out"][model] = "time budget"
                continue
            turn = budget.part(costs[model] / sum(costs[name] for name in waiting[place:]))
            found = _size_or_reason(model, settings, turn, progress, costs[model])
            if isinstance(found, str):
                result["left_out"][model] = found
                continue
            sizes[model] = {**found, "effort": effort, "git": code}
            result["sizes"] = [sizes[name] for name in V2_NAMES if name in sizes]
            _write_figure6(path, result)
    result["sizes"] = [sizes[name] for name in V2_NAMES if name in sizes]
    _write_figure6(path, result)
    report.print_steps(console, result, result["sizes"])
    for name, reason in result["left_out"].items():
        console.print(f"{short_name(name)} left out: {reason}")
    report.print_engine(console, result)
    console.print(f"Results: {path}", soft_wrap=True)
    return 0


def _size_or_reason(model: str, settings, budget, progress, cost: float) -> dict | str:
    """What was measured of a size, or why it could not be."""
    from ..benchmark import figure6
    from ..benchmark.correctness import CorrectnessError
    from ..benchmark.machine import OUT_OF_MEMORY, free_memory, out_of_memory

    def advance(share: float) -> None:
        progress.advance(share * cost)

    try:
        return figure6.measure_size(model, settings, budget, progress.log, advance)
    except CorrectnessError as error:
        raise CorrectnessError(f"{short_name(model)}: {error}") from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    free_memory(settings.device)
    return OUT_OF_MEMORY


def _write_figure6(path: Path, result: dict) -> None:
    from ..benchmark import report, results

    results.write(path, result)
    report.write_csv(path.with_suffix(".csv"), result)
    if result["sizes"] and find_spec("matplotlib") is not None:
        from ..benchmark.plot import save_figure6

        save_figure6(path.with_suffix(".png"), result)
