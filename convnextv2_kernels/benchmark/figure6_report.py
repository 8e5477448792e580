"""Figure 6 as a table on the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .._atomic_io import atomic_file
from .arguments import short
from .figure6 import NOT_ASKED, peak_of
from .report import machine_line, mebibytes

COLUMNS = (
    "model",
    "arm",
    "batch_size",
    "median_ms",
    "q1_ms",
    "q3_ms",
    "rounds",
    "images_per_s",
    "saved_bytes",
    "peak_bytes",
)


def rows(result: dict) -> list[dict]:
    """One row for each size and arm."""
    found = []
    for size in result["sizes"]:
        for name, arm in size["arms"].items():
            row = {"model": size["model"], "arm": name, "batch_size": result["parameters"]["batch_size"]}
            row |= {key: arm[key] for key in ("median_ms", "q1_ms", "q3_ms", "images_per_s", "saved_bytes")}
            row |= {"rounds": len(arm["samples_ms"]), "peak_bytes": peak_of(arm)}
            row["images_per_s"] = round(row["images_per_s"], 3)
            found.append(row)
    return found


def write_csv(path: Path, result: dict) -> None:
    """Write the rows, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(result))
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def title(result: dict) -> str:
    """What was measured, on what, in one line."""
    return f"FCMAE, forward and backward: {machine_line(result)}"


def print_sizes(console: Console, result: dict) -> None:
    """Table of every arm, then one line of ratios for each size."""
    console.print(title(result))
    table = Table()
    for name in ("size", "arm", "images/s", "median ms", "quartiles ms", "saved", "peak"):
        table.add_column(name, justify="left" if name in ("size", "arm") else "right", no_wrap=True)
    for size in result["sizes"]:
        for place, (name, arm) in enumerate(size["arms"].items()):
            table.add_row(
                "" if place else short(size["model"]),
                name,
                f"{arm['images_per_s']:.1f}",
                f"{arm['median_ms']:.1f}",
                f"{arm['q1_ms']:.1f} - {arm['q3_ms']:.1f}",
                mebibytes(arm["saved_bytes"]),
                mebibytes(peak_of(arm)) if peak_of(arm) else "",
                style="bold" if name == size["ours"] else None,
                end_section=place == len(size["arms"]) - 1,
            )
    console.print(table)
    for size in result["sizes"]:
        console.print(sentence(size))
        unweighed = {f"peak of {name}": arm["peak"].get("reason") for name, arm in size["arms"].items()}
        for name, reason in {**size["skipped"], **unweighed}.items():
            if reason and reason != NOT_ASKED:
                console.print(f"{short(size['model'])}: {name} skipped: {reason}")
    for name, reason in result["left_out"].items():
        console.print(f"{short(name)} left out: {reason}")


def sentence(size: dict) -> str:
    """The ratios of one size in words."""
    found = size["ratios"]
    text = (
        f"{short(size['model'])}: {size['ours']} has {found['throughput']:.2f} times the throughput of the fastest "
        f"dense arm ({found['fastest_dense'].removeprefix('dense ')}) and saves {found['saved']:.1f} times fewer bytes"
    )
    if "peak" in found:
        text += f"; its peak is {found['peak']:.1f} times lower"
    return text
