"""Command line of ``bench --scaling``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from convnextv2_kernels import backends, schedule
from convnextv2_kernels.benchmark import arguments, machine, report
from convnextv2_kernels.benchmark.baseline import PATCH
from convnextv2_kernels.benchmark.device import DEVICES, default_device, no_gpu
from convnextv2_kernels.benchmark.exits import exit_code
from convnextv2_kernels.benchmark.options import DTYPES, Budget
from convnextv2_kernels.benchmark.progress import Progress
from convnextv2_kernels.benchmark.results import resume

from . import measure as scaling
from .fit import series_of
from .report import print_series, write_csv

PROG = "python -m convnextv2_kernels bench --scaling"
VALUES: dict[str, tuple[float, ...]] = {
    "batch_size": (1, 2, 4, 8, 16, 32),
    "img_size": (96, 160, 224, 320, 448),
    "mask_ratio": (0.0, 0.2, 0.4, 0.6, 0.8, 0.9),
}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the mode's options."""
    default = scaling.Settings()
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Time and memory of our FCMAE step (forward and backward) by batch size, image size and mask "
        "ratio, each beside the ideal: proportional to the visible pixels, but for the decoder, which sees all. Says "
        "whether the cost is linear, and whether the hidden chunk is bounded whatever the batch.",
        epilog="Writes scaling.json and scaling.csv to --output after every axis, and scaling.png at the end. The same "
        "command goes on where it was stopped, and measures only what the file does not hold. Exit code 1: "
        "results disagree with masked dense PyTorch, and nothing was timed.",
    )
    add = parser.add_argument
    add("--model", type=arguments.model, default=default.model, metavar="SIZE", help="default: atto")
    for axis, kind, text in (
        ("batch_size", arguments.positive, "images per step"),
        ("img_size", arguments.image_size, f"sides in pixels, multiples of {PATCH}"),
        ("mask_ratio", arguments.fraction, "shares of the patches that are hidden"),
    ):
        option = "--" + axis.replace("_", "-")
        values = " ".join(f"{value:g}" for value in VALUES[axis])
        note = f"{text} (default: {values}; nothing: leave the axis out)"
        add(option + "s", nargs="*", type=kind, default=list(VALUES[axis]), metavar="V", help=note)
        fixed = getattr(default, axis)
        add(option, type=kind, default=fixed, metavar="V", help=f"where another axis varies (default: {fixed})")
    add("--repeats", type=arguments.positive, default=default.repeats, metavar="N", help="timed rounds (default: 10)")
    add("--dtype", choices=list(DTYPES), default=default.dtype, help="bfloat16: autocast (default: float32)")
    add("--device", choices=DEVICES, help="default: cuda where there is a GPU, else cpu")
    add("--backend", choices=backends.NAMES, default=backends.forced(), help="that serves our step (default: auto)")
    add(
        "--dense",
        action=argparse.BooleanOptionalAction,
        default=default.dense,
        help=f"measure masked dense PyTorch beside it, {scaling.DENSE_VARIANT.name} (default: yes)",
    )
    add(
        "--peak",
        action=argparse.BooleanOptionalAction,
        default=default.peak,
        help="also the peak memory of each point in a process of its own (default: no)",
    )
    add("--tolerance", type=arguments.fraction, default=0.1, metavar="X", help="of the verdict (default: 0.1)")
    add("--threads", type=arguments.positive, metavar="N", help="of PyTorch (default: its own choice)")
    add("--seed", type=int, default=default.seed, help="of weights and inputs (default: 0)")
    add(
        "--time-budget",
        type=arguments.seconds,
        metavar="SECONDS",
        help="start no further point after this time, and fewer rounds of an axis; what was left out is named",
    )
    add("--restart", action="store_true", help="begin a new file, dropping the one in --output")
    add("--output", type=Path, default=Path("bench_output"), metavar="DIR", help="folder (default: bench_output)")
    return parser


def settings_of(args: argparse.Namespace) -> scaling.Settings:
    """Settings of a command line, the device's default filled in."""
    names = {field.name for field in dataclasses.fields(scaling.Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return scaling.Settings(**{**given, "device": args.device or default_device()})


def why_not(settings: scaling.Settings) -> str | None:
    """Why the settings cannot be measured here, None if they can."""
    reason = no_gpu(settings.device)
    if reason:
        return reason
    if settings.backend != "auto":
        for dtype in (torch.float32, settings.torch_dtype):
            reason = backends.why_not(settings.backend, settings.device, dtype)
            if reason:
                return f"--backend is {settings.backend}, but {reason}"
    return None


def main(argv: Sequence[str]) -> int:
    """Run the mode; returns the exit code: 0, 1 (correctness gate red), 2 (bad input) or 130 (interrupted)."""
    args = build_parser().parse_args(argv)
    settings = settings_of(args)
    again = "the same command without --restart" if args.restart else "the same command"
    stopped = f"stopped; finished axes are in {args.output}, {again} measures the others"
    return exit_code(lambda: _run(settings, args), args.threads, why_not(settings), stopped)


def _run(settings: scaling.Settings, args: argparse.Namespace) -> int:
    path = args.output / "scaling.json"
    parameters = {**dataclasses.asdict(settings), "dense_variant": scaling.DENSE_VARIANT.name}
    save = schedule.save_policy(settings.device)
    parameters |= {"chunk_bytes": schedule.chunk_bytes(settings.device), "save": save}
    result = resume(path, "scaling", parameters, machine.describe(settings.device), args.restart)
    known = {series["axis"]: series["points"] for series in result.get("series", [])}
    missing = {axis: _missing(axis, getattr(args, axis + "s"), settings, known) for axis in scaling.AXES}
    costs = {axis: sum(point.patches + point.visible for point in points) for axis, points in missing.items()}
    console, stderr = report.make_console(), report.make_console(stderr=True)
    budget = Budget(args.time_budget)
    left_out = {series["axis"]: dict(series["left_out"]) for series in result.get("series", [])}
    with Progress(stderr, "Scaling", sum(costs.values())) as progress:
        busy = machine.why_busy(result["machine"])
        if busy:
            progress.log(busy)
        if any(missing.values()):
            progress.log("comparing losses and gradients with float64")
            result["gate"] = scaling.check(settings)
        for index, (axis, points) in enumerate(missing.items()):
            if points:
                turn = budget.part(costs[axis] / sum(list(costs.values())[index:]))

                def advance(share: float, cost: float = costs[axis]) -> None:
                    progress.advance(share * cost)

                measured, reasons = scaling.measure_axis(points, settings, turn, progress.log, advance)
                again = {str(point) for point in points}
                kept = {what: why for what, why in left_out.get(axis, {}).items() if what not in again}
                left_out[axis] = kept | reasons
                known[axis] = [*known.get(axis, []), *measured]
            result["series"] = [
                series_of(
                    name, known[name], left_out.get(name, {}), settings.torch_dtype.itemsize, save, args.tolerance
                )
                for name in scaling.AXES
                if known.get(name) or left_out.get(name)
            ]
            _write(path, result)
    for series in result["series"]:
        print_series(console, series)
    console.print(f"Results: {path}", soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No picture: matplotlib is not installed (pip install matplotlib).")
    elif any(series["points"] for series in result["series"]):
        from .plot import save_plot

        save_plot(path.with_suffix(".png"), result)
        console.print(f"Picture: {path.with_suffix('.png')}", soft_wrap=True)
    return 0


def _missing(
    axis: str, values: Sequence[float], settings: scaling.Settings, known: dict[str, list[dict]]
) -> list[scaling.Point]:
    """Points of an axis that the file does not hold."""
    held = {point[axis] for point in known.get(axis, [])}
    return [point for point in scaling.points_of(axis, values, settings) if getattr(point, axis) not in held]


def _write(path: Path, result: dict) -> None:
    report.write_report(path, result)
    write_csv(path.with_suffix(".csv"), result)
