"""Command line of ``python -m bench scaling``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Sequence

from convnextv2_kernels import backends, schedule
from convnextv2_kernels._progress import Progress
from convnextv2_kernels.benchmark import machine, report, results
from convnextv2_kernels.benchmark.timing import Budget, control_sentence
from convnextv2_kernels.cli.bench import add_common, measured, require_visible, suffix, warn_if_busy
from convnextv2_kernels.cli.exit_codes import USAGE, UserError
from convnextv2_kernels.cli.types import PATCH, model_name, positive_int, seconds, share_or_zero, side

from . import measure as scaling
from .fit import series_of
from .report import print_series, write_csv

PROG = "python -m bench scaling"
VALUES: dict[str, tuple[float, ...]] = {
    "batch_size": (1, 2, 4, 8, 16, 32),
    "img_size": (96, 160, 224, 320, 448),
    "mask_ratio": (0.0, 0.2, 0.4, 0.6, 0.8, 0.9),
}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the mode's options."""
    default = scaling.ScalingSettings()
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
    add("--model", type=model_name, default=default.model, metavar="SIZE", help="default: atto")
    for axis, kind, text in (
        ("batch_size", positive_int, "images per step"),
        ("img_size", side, f"sides in pixels, multiples of {PATCH}"),
        ("mask_ratio", share_or_zero, "shares of the patches that are hidden"),
    ):
        option = "--" + axis.replace("_", "-")
        values = " ".join(f"{value:g}" for value in VALUES[axis])
        note = f"{text} (default: {values}; nothing: leave the axis out)"
        add(option + "s", nargs="*", type=kind, default=list(VALUES[axis]), metavar="V", help=note)
        fixed = getattr(default, axis)
        add(option, type=kind, default=fixed, metavar="V", help=f"where another axis varies (default: {fixed})")
    add("--repeats", type=positive_int, default=default.repeats, metavar="N", help="timed rounds (default: 10)")
    add_common(parser)
    parser.set_defaults(dtype=default.dtype)
    add("--backend", choices=backends.NAMES, default=backends.forced(), help="that serves our step (default: auto)")
    add(
        "--dense",
        action=argparse.BooleanOptionalAction,
        default=default.dense,
        help=f"measure masked dense PyTorch beside it, {scaling.DENSE_BASELINE.name} (default: yes)",
    )
    add(
        "--peak",
        action=argparse.BooleanOptionalAction,
        default=default.peak,
        help="also the peak memory of each point in a process of its own (default: no)",
    )
    add("--tolerance", type=share_or_zero, default=0.1, metavar="X", help="of the verdict (default: 0.1)")
    add(
        "--time-budget",
        type=seconds,
        metavar="SECONDS",
        help="start no further point after this time, and fewer rounds of an axis; what was left out is named",
    )
    add("--restart", action="store_true", help="begin a new file, dropping the one in --output")
    return parser


def why_not(settings: scaling.ScalingSettings) -> str | None:
    """Why a backend cannot be measured here, None if it can."""
    if settings.backend != "auto":
        for dtype in dict.fromkeys((settings.torch_dtype, scaling.torch.float32)):
            reason = machine.unsupported_reason(settings.backend, settings.device, dtype)
            if reason:
                return f"--backend is {settings.backend}, but {reason}"
    return None


def main(argv: Sequence[str]) -> int:
    """Run the mode; return the exit code."""
    args = build_parser().parse_args(argv)
    args.device = args.device or machine.default_device()
    names = {field.name for field in dataclasses.fields(scaling.ScalingSettings)}
    settings = scaling.ScalingSettings(**{name: value for name, value in vars(args).items() if name in names})
    require_visible(settings.img_size, settings.mask_ratio)
    reason = machine.no_gpu(settings.device) or why_not(settings)
    if reason:
        raise UserError(reason, code=USAGE)
    again = "the same command without --restart" if args.restart else "the same command"
    try:
        return measured(args, functools.partial(_run, settings, args))
    except KeyboardInterrupt as stop:
        message = f"stopped; finished axes are in {args.output}, {again} measures the others"
        raise KeyboardInterrupt(message) from stop


def _run(settings: scaling.ScalingSettings, args: argparse.Namespace, mode: str) -> int:
    path = args.output / f"scaling{suffix(mode)}.json"
    save = schedule.save_policy(settings.device)
    parameters = {
        **dataclasses.asdict(settings),
        "dense_variant": scaling.DENSE_BASELINE.name,
        "chunk_bytes": schedule.chunk_bytes(settings.device),
        "save": save,
    }
    start = results.describe_run("scaling", parameters, mode, settings.device)
    result = results.resume(path, start, args.restart)
    with results.reading(path):
        known = {series["axis"]: series["points"] for series in result.get("series", [])}
        missing = {axis: _missing(axis, getattr(args, axis + "s"), settings, known) for axis in scaling.AXES}
        controls = {series["axis"]: series.get("control") for series in result.get("series", [])}
        left_out = {series["axis"]: dict(series["left_out"]) for series in result.get("series", [])}
        for axis, points in known.items():
            series_of(axis, points, left_out[axis], settings.torch_dtype.itemsize, save, args.tolerance)
    costs = {axis: sum(point.patches + point.visible for point in points) for axis, points in missing.items()}
    console, stderr = report.make_console(), report.make_console(stderr=True)
    budget = Budget(args.time_budget)
    with Progress("Scaling", sum(costs.values()), console=stderr, percent=True) as progress:
        warn_if_busy(start, progress.log)
        if any(missing.values()):
            progress.log("comparing losses and gradients with float64")
            result["correctness"] = scaling.check(settings)
        for index, (axis, points) in enumerate(missing.items()):
            if points:
                turn = budget.part(costs[axis] / sum(list(costs.values())[index:]))

                def advance(share: float, cost: float = costs[axis]) -> None:
                    progress.advance(share * cost)

                found, reasons, control = scaling.measure_axis(points, settings, turn, progress.log, advance)
                again = {str(point) for point in points}
                kept = {what: why for what, why in left_out.get(axis, {}).items() if what not in again}
                left_out[axis] = kept | reasons
                known[axis] = [*known.get(axis, []), *found]
                controls[axis] = worse(controls.get(axis), control)
            result["series"] = [
                {
                    **series_of(
                        name, known[name], left_out.get(name, {}), settings.torch_dtype.itemsize, save, args.tolerance
                    ),
                    "control": controls.get(name),
                }
                for name in scaling.AXES
                if known.get(name) or left_out.get(name)
            ]
            _write(path, result)
    for series in result["series"]:
        print_series(console, series)
        warning = control_sentence(series["control"])
        if warning and series["points"]:
            console.print(f"{series['axis']}: {warning}", markup=False)
    report.print_allocator(console, result)
    console.print(f"Results: {path}", soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No picture: matplotlib is not installed (pip install matplotlib).")
    elif any(series["points"] for series in result["series"]):
        from .plot import save_plot

        save_plot(path.with_suffix(".png"), result)
        console.print(f"Picture: {path.with_suffix('.png')}", soft_wrap=True)
    return 0


def worse(before: dict | None, now: dict | None) -> dict | None:
    """Of the controls of two sessions of one axis the one that is further off."""
    known = [control for control in (before, now) if control is not None]
    return max(known, key=lambda control: abs(control["ratio"] - 1), default=None)


def _missing(
    axis: str, values: Sequence[float], settings: scaling.ScalingSettings, known: dict[str, list[dict]]
) -> list[scaling.Point]:
    """Points of an axis that the file does not hold."""
    held = {point[axis] for point in known.get(axis, [])}
    return [point for point in scaling.points_of(axis, values, settings) if getattr(point, axis) not in held]


def _write(path, result: dict) -> None:
    results.write(path, result)
    write_csv(path.with_suffix(".csv"), result)
