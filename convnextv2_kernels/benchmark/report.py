"""What a run leaves behind: one JSON file, tables on the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .._atomic_io import atomic_file
from .variants import MASK_RATIO, SPARSE

WIDTH_IN_FILES = 120


def make_console(stderr: bool = False) -> Console:
    """A console whose tables are not squeezed where the output is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, width=WIDTH_IN_FILES)


def write_report(path: Path, report: dict) -> None:
    """Write the JSON atomically, each list of samples on one line."""
    text = json.dumps(report, indent=2, allow_nan=False)
    text = re.sub(r"\[[-+\d.eE,\s]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    with atomic_file(path) as file:
        file.write((text + "\n").encode())


def machine_line(result: dict) -> str:
    """What a result was measured on, and with which settings."""
    machine, p = result["machine"], result["parameters"]
    hardware = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return (
        f"{hardware}, PyTorch {machine['torch']}, {p['dtype']}, batch {p['batch_size']}, {p['img_size']} px, "
        f"mask ratio {p.get('mask_ratio', MASK_RATIO):g}"
    )


def mebibytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB"


def print_step(console: Console, step: dict, parameters: dict, threads: int) -> None:
    """Table of one model's training step."""
    console.print(_step_title(step, parameters, threads))
    table = Table()
    for name in ("arm", "median ms", "quartiles ms", "time / sparse", "saved", "peak"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name == "arm")
    sparse = step["arms"][SPARSE]
    for name, arm in step["arms"].items():
        peak = arm["peak"]
        table.add_row(
            name,
            f"{arm['median_ms']:.1f}",
            f"{arm['q1_ms']:.1f} - {arm['q3_ms']:.1f}",
            f"{arm['median_ms'] / sparse['median_ms']:.2f}",
            mebibytes(arm["saved_bytes"]),
            "" if peak is None or peak["bytes"] is None else mebibytes(peak["bytes"]),
            style="bold" if name == SPARSE else None,
        )
    for name, reason in step["skipped"].items():
        table.add_row(name, f"skipped: {reason}")
    console.print(table)
    console.print(
        f"The fastest dense variant ({step['fastest_dense']}) takes {step['time_ratio']:.2f} times "
        f"the time of the sparse step; the most frugal ({step['frugal_dense']}) saves "
        f"{step['saved_ratio']:.1f} times the bytes."
    )
    for name, arm in step["arms"].items():
        if arm["peak"] is not None and arm["peak"]["bytes"] is None:
            console.print(f"Peak memory of {name} is unknown: {arm['peak']['reason']}")
    console.print()


def _step_title(step: dict, parameters: dict, threads: int) -> str:
    flops = step["flops"]
    return (
        f"{step['model']}: FCMAE step (forward and backward), batch {parameters['batch_size']}, "
        f"{parameters['img_size']} px, {parameters['dtype']}, {threads} threads\nCounted work: "
        f"{flops['sparse'] * 1e-9:.1f} GFLOP sparse, {flops['dense'] * 1e-9:.1f} dense"
    )


def print_ops(console: Console, model: str, ops: dict) -> None:
    """Table of one model's ops; rates are counted minimum work over measured time.

    The limit is the least time of the counted work at the rates measured in the same run.
    """
    limits = ops["ceilings"]
    rates = ", ".join(f"{c['gbytes']:.0f} ({mebibytes(c['traffic_bytes'])})" for c in limits["copies"])
    console.print(
        f"{model}: ops, forward and backward, of width C on patches of s x s sites\n"
        "Dense is the fastest variant, named; rates are sparse | dense; limit: share of the sparse time that its "
        "counted work must take, m of memory, c of computing\n"
        f"This machine at most: {limits['gflops']:.0f} GFLOP/s ({limits['product']}); GB/s by bytes moved: {rates}"
    )
    table = Table(padding=(0, 0, 0, 1))
    for name in ("op", "C", "s", "sparse ms", "limit", "dense ms", "variant", "ratio", "GFLOP/s", "GB/s"):
        text = name in ("op", "variant")
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    for row in ops["rows"]:
        sparse, dense = row["arms"][SPARSE], row["arms"][row["fastest_dense"]]
        rates = [arm["rates"] for arm in (sparse, dense)]
        table.add_row(
            row["op"],
            str(row["width"]),
            str(row["side"]),
            f"{sparse['median_ms']:.2f}",
            f"{100 * sparse['share']:.0f}% {sparse['bound'][0]}",
            f"{dense['median_ms']:.2f}",
            row["fastest_dense"],
            f"{row['time_ratio']:.2f}",
            " | ".join(f"{rate['gflops']:.0f}" for rate in rates) if rates[0]["gflops"] else "",
            " | ".join(f"{rate['gbytes']:.1f}" for rate in rates),
        )
    console.print(table)
    for row in ops["rows"]:
        for name, arm in row["arms"].items():
            if "comparable" in arm:
                times = arm["median_ms"] / row["arms"][SPARSE]["median_ms"]
                ratio = f", {times:.1f} times ours" if arm["comparable"] else ""
                shape = f"C={row['width']} s={row['side']}"
                console.print(f"{row['op']} {shape} by {name}: {arm['median_ms']:.2f} ms{ratio}")
    for engine, reason in {k: v for row in ops["rows"] for k, v in row.get("engines_left_out", {}).items()}.items():
        console.print(f"{engine} is left out: {reason}")
    if ops["skipped"]:
        console.print(f"Skipped for the time budget: {', '.join(ops['skipped'])}")
    console.print()
