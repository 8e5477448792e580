"""Command line of ``bench --figure6``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..models import CONFIGS
from . import arguments, fits, machine, report
from .correctness import GateError
from .device import DEVICES, OUT_OF_MEMORY, default_device, free_memory, no_gpu, out_of_memory
from .exits import exit_code
from .figure6 import Settings, complete, left_out, measure_size
from .figure6_report import print_sizes, write_csv
from .options import DTYPES, Budget
from .progress import Progress
from .results import resume

PROG = "python -m convnextv2_kernels bench --figure6"
# On a CPU an image takes up to a second; batch 64 is the paper's.
BATCH = {"cpu": 8, "cuda": 64}
REPEATS = {"cpu": 5, "cuda": 20}
# Seconds of a size grow with its parameters, beside a part that every size takes, as much as these many parameters.
FIXED_COST = 100e6
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the mode's options."""
    sizes = [arguments.short(name) for name in CONFIGS]
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Throughput, peak memory and bytes saved for backward of masked pre-training by model size: masked "
        "dense PyTorch, eager and compiled, against every backend of this library; the comparison of the paper's "
        "Figure 6 (Appendix C). Results are checked against float64 before anything is timed.",
        epilog="Writes figure6.json, figure6.csv and figure6.png to --output, after every size. The same command goes "
        "on where it was stopped, and measures a size again that was measured with less effort. Exit code 1: results "
        "disagree; that size and those after it were not timed.",
    )
    parser.add_argument(
        "--models", nargs="+", type=arguments.model, metavar="SIZE", help=f"of {', '.join(sizes)} (default: all)"
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--batch-size", type=arguments.positive, metavar="N", help="images per step (default: 64, on a CPU 8)"
    )
    parser.add_argument(
        "--img-size", type=arguments.image_size, default=224, metavar="S", help="side in pixels (default: 224)"
    )
    parser.add_argument(
        "--mask-ratio", type=arguments.fraction, default=0.6, metavar="R", help="share that is hidden (default: 0.6)"
    )
    parser.add_argument(
        "--repeats", type=arguments.positive, metavar="N", help="timed rounds of all arms (default: 20, on a CPU 5)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="bfloat16: autocast (default: on a GPU, else float32)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="measure torch.compile (default: yes)"
    )
    parser.add_argument(
        "--peak", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory (default: yes)"
    )
    parser.add_argument("--threads", type=arguments.positive, metavar="N", help="of PyTorch (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument(
        "--time-budget",
        type=arguments.seconds,
        metavar="SECONDS",
        help="start no further size after this time; of one, fewer rounds (three at least), no compiled arms or peaks "
        "(default: none)",
    )
    parser.add_argument("--restart", action="store_true", help="begin a new file, dropping the one in --output")
    parser.add_argument(
        "--output", type=Path, default=Path("bench_output"), metavar="DIR", help="folder (default: bench_output)"
    )
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings of a command line, the device's defaults filled in."""
    device = args.device or default_device()
    return Settings(
        models=tuple(dict.fromkeys(args.models or CONFIGS)),
        batch_size=args.batch_size or BATCH[device],
        img_size=args.img_size,
        mask_ratio=args.mask_ratio,
        repeats=args.repeats or REPEATS[device],
        dtype=args.dtype or DTYPE[device],
        device=device,
        compile=args.compile,
        peak=args.peak,
        seed=args.seed,
    )


def main(argv: Sequence[str]) -> int:
    """Run the mode; returns the exit code: 0, 1 (correctness gate red), 2 (bad input) or 130 (interrupted)."""
    args = build_parser().parse_args(argv)
    settings = settings_of(args)
    again = "the same command without --restart" if args.restart else "the same command"
    stopped = f"stopped; finished sizes are in {args.output}, {again} measures the others"
    return exit_code(lambda: _run(settings, args), args.threads, no_gpu(settings.device), stopped)


def _run(settings: Settings, args: argparse.Namespace) -> int:
    parameters = dataclasses.asdict(settings)
    models = parameters.pop("models")
    # These may differ from size to size: a large one may do with fewer rounds and without an hour of compiling.
    effort = {name: parameters.pop(name) for name in ("repeats", "compile", "peak")}
    path = args.output / "figure6.json"
    description, code = machine.describe(settings.device), machine.git_commit()
    result = resume(path, "figure6", parameters, description, args.restart)
    sizes = {size["model"]: size for size in result.get("sizes", [])}
    done = [model for model in models if model in sizes and complete(sizes[model], settings)]
    reasons = {model: left_out(model, settings) for model in models if model not in done}
    waiting = [model for model, reason in reasons.items() if reason is None]
    # What was left out before and is not asked for now stays left out.
    before = {model: reason for model, reason in result.get("left_out", {}).items() if model not in models}
    result["left_out"] = before | {model: reason for model, reason in reasons.items() if reason}
    budget = Budget(args.time_budget)
    costs = {model: fits.parameter_count(model) + FIXED_COST for model in waiting}
    console, stderr = report.make_console(), report.make_console(stderr=True)
    with Progress(stderr, "Figure 6", sum(costs.values())) as progress:
        busy = machine.why_busy(description)
        if busy:
            progress.log(busy)
        for model in done:
            other = "" if sizes[model]["git"] == code else ", by other code"
            progress.log(f"{model}: measured before{other}")
        for model, reason in result["left_out"].items():
            progress.log(f"{model}: left out, {reason}")
        for place, model in enumerate(waiting):
            if budget.spent:
                result["left_out"][model] = "time budget"
                continue
            turn = budget.part(costs[model] / sum(costs[name] for name in waiting[place:]))

            def advance(share: float, cost: float = costs[model]) -> None:
                progress.advance(share * cost)

            try:
                measured = measure_size(model, settings, turn, progress.log, advance)
            except GateError as error:
                raise GateError(f"{arguments.short(model)}: {error}") from error
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                result["left_out"][model] = OUT_OF_MEMORY
                free_memory(settings.device)
                continue
            sizes[model] = {**measured, "effort": effort, "git": code}
            result["sizes"] = [sizes[name] for name in CONFIGS if name in sizes]
            _write(path, result)
    result["sizes"] = [sizes[name] for name in CONFIGS if name in sizes]
    _write(path, result)
    print_sizes(console, result)
    console.print(f"Results: {path}", soft_wrap=True)
    return 0


def _write(path: Path, result: dict) -> None:
    report.write_report(path, result)
    write_csv(path.with_suffix(".csv"), result)
    if result["sizes"] and importlib.util.find_spec("matplotlib") is not None:
        from .figure6_plot import save_plot

        save_plot(path.with_suffix(".png"), result)
