"""Time and memory by batch size, image size and mask ratio, each with the ideal line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from convnextv2_kernels._files import atomic_file
from convnextv2_kernels.benchmark.report import machine_line, short
from convnextv2_kernels.benchmark.variants import SPARSE

from .report import TITLES, largest_chunk

_OURS, _DENSE, _WORKING, _CHUNK = "#c2410c", "#94a3b8", "#0f766e", "#1d4ed8"
_NOTES = {
    "batch_size": "images in a step (log scales)",
    "img_size": "side of the images in pixels (log scales)",
    "mask_ratio": "mask ratio; left to right: more visible pixels",
}
MIB = 2.0**20
_OURS_LABEL, _DENSE_LABEL = "ours: time, bytes saved", "masked dense PyTorch: time, bytes saved"
_LEFT = {"fontsize": 9.5, "loc": "left"}


def save_plot(path: Path, result: dict) -> None:
    """Write a PNG: time above memory, a column for each measured axis."""
    measured = [series for series in result["series"] if series["points"]]
    figure = Figure(figsize=(1.0 + 5.2 * len(measured), 9.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(result), fontsize=10)
    grid = figure.subplots(2, len(measured), squeeze=False)
    for column, series in enumerate(measured):
        _draw_time(grid[0][column], series)
        _draw_memory(grid[1][column], series)
        name = TITLES[series["axis"]]
        grid[0][column].set_title(_verdict(series, "median_ms", f"Time by {name}", "ms", 1.0), **_LEFT)
        saved = _verdict(series, "saved_bytes", f"Saved for backward by {name}", "MiB", MIB)
        grid[1][column].set_title(saved + _chunk_verdict(series), **_LEFT)
    grid[0][0].set_ylabel("milliseconds (median, quartiles)")
    grid[1][0].set_ylabel("MiB")
    handles = {}
    for axis in grid.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _title(result: dict) -> str:
    model = short(result["parameters"]["model"])
    return f"FCMAE step (forward and backward) of {model}, one setting varied at a time: {machine_line(result)}"


def _verdict(series: dict, name: str, title: str, unit: str, scale: float) -> str:
    fit = series["fit"].get(name)
    if fit is None:
        return f"{title}\ntoo few points for a line"
    words = {True: "linear", False: "not linear", None: "noise hides whether linear"}
    fixed = round(fit["intercept"] / scale, 1) or 0.0  # not "-0.0"
    return (
        f"{title}: {words[fit['linear']]} within {fit['tolerance']:.0%}\n{fixed:.1f} {unit} + "
        f"{1e6 * fit['slope'] / scale:.0f} {unit} per visible Mpx; R² {fit['r2']:.3f}, exponent "
        f"{fit['exponent']:.2f} (ideal {fit['ideal_exponent']:.2f})"
    )


def _chunk_verdict(series: dict) -> str:
    verdict = series.get("hidden_chunk")
    if verdict is None:
        return "\n"  # titles of one row have as many lines
    if verdict["bounded"]:
        return f"\nHidden chunk: within {verdict['limit_bytes'] / MIB:.1f} MiB whatever the batch"
    return "\nHidden chunk: not shown to be bounded, see the report"


def _places(series: dict) -> list[float]:
    """Where the points stand: by patches where those vary, else by the visible share."""
    if series["axis"] == "mask_ratio":
        return [point["visible_patches"] / point["patches"] for point in series["points"]]
    return [point["patches"] for point in series["points"]]


def _frame(axis: Axes, series: dict, logarithmic: bool) -> None:
    xs = _places(series)
    if series["axis"] == "mask_ratio":
        axis.set_xlim(0, 1.05)
    else:
        axis.set_xscale("log")
    if logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(FixedLocator(xs))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{point[series['axis']]:g}" for point in series["points"]])
    axis.set_xlabel(_NOTES[series["axis"]], fontsize=9)
    axis.grid(linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _rows_of(series: dict, name: str) -> tuple[list[float], list[dict]]:
    pairs = [
        (x, point["variants"][name])
        for x, point in zip(_places(series), series["points"], strict=True)
        if name in point["variants"]
    ]
    return [x for x, _ in pairs], [row for _, row in pairs]


def _draw_time(axis: Axes, series: dict) -> None:
    for name, color, label in (("dense", _DENSE, _DENSE_LABEL), (SPARSE, _OURS, _OURS_LABEL)):
        xs, rows = _rows_of(series, name)
        if not xs:
            continue
        medians = [row["median_ms"] for row in rows]
        below = [row["median_ms"] - row["q1_ms"] for row in rows]
        above = [row["q3_ms"] - row["median_ms"] for row in rows]
        style = {"color": color, "linewidth": 1.4, "markersize": 4.5, "capsize": 3, "elinewidth": 1.0}
        axis.errorbar(xs, medians, yerr=[below, above], fmt="o-", label=label, **style)
    _draw_ideal(axis, series, "median_ms", 1.0)
    # Over the mask ratio the ideal is a line with the decoder's share as its height, which a log scale would bend.
    _frame(axis, series, logarithmic=series["axis"] != "mask_ratio")


def _draw_ideal(axis: Axes, series: dict, name: str, scale: float) -> None:
    values = [point["ideal"][name] / scale for point in series["points"]]
    label = "ideal, through the largest point"
    axis.plot(_places(series), values, "--", color="black", linewidth=1.2, label=label, zorder=5)


def _draw_memory(axis: Axes, series: dict) -> None:
    xs, rows = _rows_of(series, "dense")
    if xs:
        _line(axis, xs, [row["saved_bytes"] for row in rows], "o-", _DENSE, _DENSE_LABEL)
    xs, rows = _rows_of(series, SPARSE)
    _line(axis, xs, [row["saved_bytes"] for row in rows], "o-", _OURS, _OURS_LABEL)
    _draw_ideal(axis, series, "saved_bytes", MIB)
    _line(axis, xs, [row["working_bytes"] for row in rows], "s-", _WORKING, "ours: working memory beyond that")
    chunks = [largest_chunk(row) for row in rows]
    if all(chunks):
        _line(axis, xs, chunks, "d-", _CHUNK, "ours: largest hidden chunk")
        limits = [max(stage["limit_bytes"] for stage in row["hidden"].values()) for row in rows]
        whole = [max(stage["whole_bytes"] for stage in row["hidden"].values()) for row in rows]
        axis.plot(
            xs, [limit / MIB for limit in limits], ":", color=_CHUNK, label="limit of a hidden chunk, by the rule"
        )
        label = "hidden tensor if it were not cut"
        axis.plot(xs, [size / MIB for size in whole], "-.", color=_CHUNK, alpha=0.6, linewidth=1.3, label=label)
    _frame(axis, series, logarithmic=True)


def _line(axis: Axes, xs: Sequence[float], sizes: Sequence[int], style: str, color: str, label: str) -> None:
    axis.plot(xs, [size / MIB for size in sizes], style, color=color, linewidth=1.4, markersize=4.5, label=label)
