"""Command line of ``python -m bench ops``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.util
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from convnextv2_kernels._progress import Progress
from convnextv2_kernels.benchmark import machine, report, results
from convnextv2_kernels.benchmark.timing import Budget, control_sentence
from convnextv2_kernels.benchmark.variants import SPARSE
from convnextv2_kernels.cli.bench import add_common, make_folder, measured, require_visible, suffix, warn_if_busy
from convnextv2_kernels.cli.types import PATCH, model_name, positive_int, seconds, side

from . import host_time
from .measure import OpSettings, measure_ops

PROG = "python -m bench ops"
QUICK = {"models": ("convnextv2_atto",), "batch_size": 2, "repeats": 3}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the mode's options; absent ones are None, so that --quick can fill them."""
    default = OpSettings()
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Every op, forward and backward, on every stage of a model, beside masked dense PyTorch, other "
        "sparse engines where they are installed, and what this machine could do at most; and the host time of a block "
        "before any work is done. Results are checked against float64 before anything is timed.",
        epilog="Writes one JSON file and a chart to --output and prints tables. Exit code 1: the results disagree, and "
        "nothing was timed.",
    )
    add = parser.add_argument
    add("--models", nargs="+", type=model_name, metavar="SIZE", help="such as atto (default: atto tiny)")
    add("--batch-size", type=positive_int, metavar="N", help=f"images (default: {default.batch_size})")
    add("--img-size", type=side, default=224, metavar="S", help=f"side in pixels, a multiple of {PATCH} (default: 224)")
    add("--repeats", type=positive_int, metavar="N", help=f"timed rounds (default: {default.repeats})")
    add_common(parser)
    parser.set_defaults(dtype="float32")
    add("--quick", action="store_true", help="atto, batch 2, 3 rounds, unless told otherwise")
    add("--no-compile", dest="compile", action="store_false", help="no compiled peers, each of which takes seconds")
    add("--time-budget", type=seconds, metavar="SECONDS", help="start no further op after this time (default: none)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the mode; return the exit code."""
    args = build_parser().parse_args(argv)
    defaults = dataclasses.asdict(OpSettings())
    for name in ("models", "batch_size", "repeats"):
        if getattr(args, name) is None:
            setattr(args, name, (QUICK if args.quick else defaults)[name])
    args.models = tuple(dict.fromkeys(args.models))
    require_visible(args.img_size)
    args.device = args.device or machine.default_device()
    return measured(args, functools.partial(_run, args))


def _run(args: argparse.Namespace, mode: str) -> int:
    make_folder(args.output)
    fields = {field.name for field in dataclasses.fields(OpSettings)}
    settings = OpSettings(**{name: value for name, value in vars(args).items() if name in fields})
    result = results.describe_run("ops", dataclasses.asdict(settings), mode, settings.device)
    result |= {"step": [], "ops": {}, "host": {}}
    console = report.make_console()
    budget = Budget(args.time_budget)
    with (
        machine.dense_at_its_best(),
        Progress("Ops", len(settings.models), console=report.make_console(stderr=True), percent=True) as bar,
    ):
        warn_if_busy(result, bar.log)
        for done, model in enumerate(settings.models):
            turn = budget.part(1 / (len(settings.models) - done))
            result["ops"][model] = measure_ops(model, settings, turn, bar.log)
            bar.log(f"{model}: host time of a block")
            result["host"][model] = host_time.measure(model, settings.repeats, turn)
            bar.advance(1)
    for model, ops in result["ops"].items():
        print_ops(console, model, ops)
        print_host_time(console, result["host"][model])
    report.print_allocator(console, result)
    path = args.output / f"ops-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}{suffix(mode)}.json"
    results.write(path, result)
    console.print(f"Results: {path}", soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No picture: matplotlib is not installed (pip install matplotlib).")
    elif any(ops["rows"] for ops in result["ops"].values()):
        from .plot import save_limits

        save_limits(path.with_suffix(".png"), result)
        console.print(f"Picture: {path.with_suffix('.png')}", soft_wrap=True)
    return 0


def print_ops(console: Console, model: str, ops: dict) -> None:
    """Table of one model's ops; rates are counted minimum work over measured time.

    The limit is the least time of the counted work at the rates measured in the same run.
    """
    limits = ops["ceilings"]
    rates = ", ".join(f"{c['gbytes']:.0f} ({report.mebibytes(c['traffic_bytes'])})" for c in limits["copies"])
    console.print(
        f"{model}: ops, forward and backward, of width C on patches of s x s sites\n"
        "Dense is the fastest variant, named; rates are sparse | dense; limit: share of the sparse time that its "
        "counted work must take, m of memory, c of computing; ! a control that is off\n"
        f"This machine at most: {limits['gflops']:.0f} GFLOP/s ({limits['product']}); GB/s by bytes moved: {rates}"
    )
    table = Table(padding=(0, 0, 0, 1))
    for name in ("op", "C", "s", "sparse ms", "limit", "dense ms", "variant", "ratio", "control", "GFLOP/s", "GB/s"):
        text = name in ("op", "variant")
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    for row in ops["rows"]:
        sparse, dense = row["variants"][SPARSE], row["variants"][row["fastest_dense"]]
        rates = [variant["rates"] for variant in (sparse, dense)]
        table.add_row(
            row["op"],
            str(row["width"]),
            str(row["side"]),
            f"{sparse['median_ms']:.2f}",
            f"{100 * sparse['share']:.0f}% {sparse['bound'][0]}",
            f"{dense['median_ms']:.2f}",
            row["fastest_dense"],
            f"{row['time_ratio']:.2f}",
            f"{row['control']['ratio']:.2f}{'' if row['control']['valid'] else '!'}",
            " | ".join(f"{rate['gflops']:.0f}" for rate in rates) if rates[0]["gflops"] else "",
            " | ".join(f"{rate['gbytes']:.1f}" for rate in rates),
        )
    console.print(table)
    for row in ops["rows"]:
        _print_engines(console, row)
        if "compile_left_out" in row:
            console.print(f"{row['op']} C={row['width']}: no compiled peer: {row['compile_left_out']}")
    for engine, reason in {k: v for row in ops["rows"] for k, v in row.get("engines_left_out", {}).items()}.items():
        console.print(f"{engine} is left out: {reason}")
    if ops["skipped"]:
        console.print(f"Skipped for the time budget: {', '.join(ops['skipped'])}")
    console.print()


def _print_engines(console: Console, row: dict) -> None:
    for name, variant in row["variants"].items():
        if "comparable" in variant:
            times = variant["median_ms"] / row["variants"][SPARSE]["median_ms"]
            ratio = f", {times:.1f} times ours" if variant["comparable"] else ""
            shape = f"C={row['width']} s={row['side']}"
            console.print(f"{row['op']} {shape} by {name}: {variant['median_ms']:.2f} ms{ratio}")


def print_host_time(console: Console, host: dict) -> None:
    """Microseconds of a block's passes before any work is done."""
    console.print(f"{host['model']}: host time of a block of width {host['width']}, one site, one thread")
    for kind, found in host["passes"].items():
        times = ", ".join(f"{name} {variant['median_us']:.0f} us" for name, variant in found["variants"].items())
        console.print(f"  {kind}: {times}")
        warning = control_sentence(found["control"])
        if warning:
            console.print(f"  {warning}")
    for name, reason in host["left_out"].items():
        console.print(f"  {name} is left out: {reason}")
    console.print()
