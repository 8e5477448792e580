"""Tables of ``python -m bench scaling``: on the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convnextv2_kernels._files import atomic_file
from convnextv2_kernels.benchmark.report import mebibytes
from convnextv2_kernels.benchmark.variants import SPARSE

POINT_COLUMNS = ("batch_size", "img_size", "mask_ratio", "patches", "visible_patches", "pixels", "visible_pixels")
VARIANT_COLUMNS = ("median_ms", "q1_ms", "q3_ms", "min_ms", "saved_bytes", "peak_bytes", "working_bytes")
TITLES = {"batch_size": "batch size", "img_size": "image size", "mask_ratio": "mask ratio"}


def largest_chunk(row: dict) -> int | None:
    """Bytes of the largest hidden tensor of a step, None where there is no schedule."""
    return max((stage["chunk_bytes"] for stage in row["hidden"].values()), default=None)


def write_csv(path: Path, result: dict) -> None:
    """One row for each point and variant; sizes in bytes, times in milliseconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    extra = ("hidden_chunk_bytes", "process_peak_bytes", "ideal_ms", "ideal_saved_bytes")
    writer.writerow(["axis", "variant", *POINT_COLUMNS, *VARIANT_COLUMNS, *extra])
    for series in result["series"]:
        for point in series["points"]:
            for name, row in point["variants"].items():
                ideal = point["ideal"] if name == SPARSE else {"median_ms": None, "saved_bytes": None}
                cells = [series["axis"], name, *(point[k] for k in POINT_COLUMNS), *(row[k] for k in VARIANT_COLUMNS)]
                peak = (row["peak"] or {}).get("bytes")
                writer.writerow([*cells, largest_chunk(row), peak, *_rounded(ideal)])
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def _rounded(ideal: dict) -> list[float | int | None]:
    time, saved = ideal["median_ms"], ideal["saved_bytes"]
    return [None if time is None else round(time, 4), None if saved is None else round(saved)]


def print_series(console: Console, series: dict) -> None:
    """Table of one axis, its lines and verdicts."""
    axis = series["axis"]
    table = Table(title=f"FCMAE step by {TITLES[axis]}", title_justify="left", padding=(0, 0, 0, 1))
    columns = (TITLES[axis], "visible Mpx", "ms", "quartiles", "ideal ms", "saved", "ideal", "working", "hidden chunk")
    names = {name: None for point in series["points"] for name in point["variants"] if name != SPARSE}
    for name in (*columns, *(f"{name} {what}" for name in names for what in ("ms", "saved"))):
        table.add_column(name, justify="right", no_wrap=True)
    for point in series["points"]:
        ours, chunk = point["variants"][SPARSE], largest_chunk(point["variants"][SPARSE])
        others = [point["variants"].get(name) for name in names]
        table.add_row(
            f"{point[axis]:g}",
            f"{point['visible_pixels'] / 1e6:.3f}",
            f"{ours['median_ms']:.2f}",
            f"{ours['q1_ms']:.1f}-{ours['q3_ms']:.1f}",
            f"{point['ideal']['median_ms']:.2f}",
            _mib(ours["saved_bytes"]),
            _mib(point["ideal"]["saved_bytes"]),
            _mib(ours["working_bytes"]),
            _mib(chunk),
            *(text for row in others for text in _times_and_bytes(row)),
        )
    console.print(table)
    console.print("Sizes in MiB; working: most live bytes of the allocator less those saved for backward.")
    for name, label, unit, scale in (("median_ms", "time", "ms", 1.0), ("saved_bytes", "saved", "MiB", 2.0**20)):
        fit = series["fit"].get(name)
        console.print(f"{label}: {_sentence(fit, unit, scale)}")
    if "hidden_chunk" in series:
        verdict = series["hidden_chunk"]
        found = "bounded whatever the batch" if verdict["bounded"] else "NOT shown to be bounded"
        console.print(f"hidden chunk: {found}: {verdict['reason']}")
    if len(series["sessions"]) > 1:
        console.print(
            f"Measured in {len(series['sessions'])} sessions; drift of the machine between them is in the fit."
        )
    for name, reason in series["left_out"].items():
        console.print(f"left out: {name}: {reason}")
    console.print()


def _mib(count: float | None) -> str:
    return "" if count is None else mebibytes(count).removesuffix(" MiB")


def _times_and_bytes(row: dict | None) -> tuple[str, str]:
    return ("", "") if row is None else (f"{row['median_ms']:.2f}", _mib(row["saved_bytes"]))


def _sentence(fit: dict | None, unit: str, scale: float) -> str:
    if fit is None:
        return "no line, as it takes three points of different cost"
    linear = {True: "linear", False: "NOT linear", None: "perhaps linear, the noise is too large to tell"}
    fixed = round(fit["intercept"] / scale, 2) or 0.0  # not "-0.00"
    return (
        f"{fixed:.2f} {unit} + {1e6 * fit['slope'] / scale:.2f} {unit} per million visible pixels, "
        f"R2 {fit['r2']:.4f}, exponent {fit['exponent']:.3f} (ideal {fit['ideal_exponent']:.3f}), at most "
        f"{fit['most_over_ideal']:.2f} times the ideal; {linear[fit['linear']]} within {fit['tolerance']:.0%}, worst "
        f"point {fit['worst_deviation']:+.1%}"
    )
