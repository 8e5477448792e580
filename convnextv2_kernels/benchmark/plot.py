"""Pictures: bars of the step's time and saved bytes, and the two panels of Figure 6."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .. import backends
from .._files import PNG_METADATA, atomic_file
from .report import machine_line, short, title
from .step import is_ours, peak_of
from .timing import control_sentence

_COLORS = {"eager": "#64748b", "compile": "#94a3b8", "graph": "#334155"}
_OUR_COLOR = "#c2410c"


def save_steps(path: Path, result: dict) -> None:
    """Write a PNG with one row for each model: medians with quartiles, and saved bytes."""
    steps = result["step"]
    bars = max(len(step["variants"]) for step in steps)
    height = 1.0 + len(steps) * (1.1 + 0.34 * bars)
    figure = Figure(figsize=(12.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"FCMAE training step: {machine_line(result)}", fontsize=12)
    axes = figure.subplots(len(steps), 2, squeeze=False)
    for step, (left, right) in zip(steps, axes, strict=True):
        _draw_times(left, step)
        _draw_bytes(right, step)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata=PNG_METADATA)


def _color(row: dict) -> str:
    return _OUR_COLOR if is_ours(row) else _COLORS[row["execution"]]


def _flag(step: dict) -> str:
    """ " (INVALID)" beside the name of a step whose control is off."""
    control = step.get("control")
    return " (INVALID: see its control)" if control is not None and control_sentence(control) else ""


def _bars(axis, step: dict, values: list[float], labels: list[str], heading: str, errors=None):
    names = list(step["variants"])
    colors = [_color(row) for row in step["variants"].values()]
    axis.barh(range(len(names)), values, color=colors, xerr=errors, ecolor="#1e293b", capsize=2)
    ends = values if errors is None else [v + e for v, e in zip(values, errors[1], strict=True)]
    for position, (end, label) in enumerate(zip(ends, labels, strict=True)):
        axis.annotate(label, (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22 * max(ends))
    axis.set_title(heading, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_times(axis, step: dict) -> None:
    rows = list(step["variants"].values())
    medians = [row["median_ms"] for row in rows]
    below = [row["median_ms"] - row["q1_ms"] for row in rows]
    above = [row["q3_ms"] - row["median_ms"] for row in rows]
    heading = f"{step['model']}: time, fastest dense / sparse = {step['ratios']['throughput']:.2f}{_flag(step)}"
    labels = [f"{m:.0f}" if m >= 100 else f"{m:.1f}" for m in medians]
    _bars(axis, step, medians, labels, heading, [below, above])
    axis.set_xlabel("milliseconds (median, quartiles)", fontsize=9)


def _draw_bytes(axis, step: dict) -> None:
    sizes = [(row["saved_bytes"] or 0) / 2**20 for row in step["variants"].values()]
    heading = f"saved for backward, least dense / sparse = {step['ratios']['saved']:.1f}"
    _bars(axis, step, sizes, [f"{s:.0f}" if s >= 100 else f"{s:.1f}" for s in sizes], heading)
    axis.set_xlabel("MiB", fontsize=9)
    axis.set_yticklabels([])


_COMMON = "#e2e8f0"
_DENSE = {
    ("nchw", "eager"): "#cbd5e1",
    ("channels_last", "eager"): "#94a3b8",
    ("nchw", "compile"): "#64748b",
    ("channels_last", "compile"): "#334155",
    ("nchw", "graph"): "#a5b4fc",
    ("channels_last", "graph"): "#4f46e5",
}
_SHADES = itertools.cycle(("#fdba74", "#c2410c", "#dc2626", "#ea580c", "#9a3412"))  # in the order of the registry
_OURS = {"auto": "#9a3412", **dict(zip(backends.REGISTRY, _SHADES, strict=False))}
_OUR_GRAPH = "#15803d"
_ENGINE = "#a16207"
SIDE_BY_SIDE = 4  # more sizes than these: one panel above the other, so that a page can hold them


def kind_of(name: str, row: dict) -> tuple[str, str]:
    """Label and color of a variant, the same for every size."""
    written, execution = row["baseline"], row["execution"]
    if row.get("engine"):
        return row["engine"], _ENGINE
    if written is None:
        backend = row.get("backend") or name.split()[1]
        if execution == "graph":
            return f"sparse, {backend}, graph", _OUR_GRAPH
        return f"sparse, {backend}", _OURS[backend]
    if written["pointwise"] == "plain" and execution == "eager":
        return "masked dense, as commonly written", _COMMON
    how = {"eager": "", "compile": ", compiled", "graph": ", graph"}[execution]
    return f"masked dense, {written['layout']}{how}", _DENSE[written["layout"], execution]


def save_figure6(path: Path, result: dict) -> None:
    """Write a PNG: grouped bars on a logarithmic axis, ratios to the best dense variant over ours."""
    sizes = result["sizes"]
    stacked = len(sizes) > SIDE_BY_SIDE
    across = 3.0 + (1.1 if stacked else 2.0) * len(sizes)
    figure = Figure(figsize=(max(9.0, across), 9.2 if stacked else 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title(result), fontsize=10)
    left, right = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
    labels = _draw(left, sizes, lambda row: row["images_per_s"], "throughput", _relative_spread)
    left.set_ylabel("images / s (median, quartiles), log scale")
    left.set_title("Throughput; in bold: ours / fastest dense", fontsize=10, loc="left")
    weighed = all(peak_of(row) for size in sizes for row in size["variants"].values() if row["execution"] != "graph")
    if weighed:
        _mark_saved(right, sizes)
        _draw(right, sizes, lambda row: (peak_of(row) or 0) / 2**20, "peak")
    else:
        _draw(right, sizes, lambda row: (row["saved_bytes"] or 0) / 2**20, "saved")
    what = "Peak memory of a step" if weighed else "Bytes saved for backward"
    right.set_ylabel("MiB, log scale")
    right.set_title(f"{what}; in bold: least dense / ours", fontsize=10, loc="left")
    handles = [Line2D([], [], color=color, marker="s", linestyle="") for color in labels.values()]
    names = list(labels)
    if weighed:
        handles.append(Line2D([], [], color="black", marker="_", linestyle="", markersize=9))
        names.append("saved for backward")
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=9, frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata=PNG_METADATA)


def _relative_spread(row: dict) -> tuple[float, float]:
    rate = row["images_per_s"]
    return rate - rate * row["median_ms"] / row["q3_ms"], rate * row["median_ms"] / row["q1_ms"] - rate


def _place(size: int, variant: int, variants: int) -> float:
    return size + (variant - (variants - 1) / 2) * 0.84 / variants


def _draw(axis: Axes, sizes: list[dict], value, ratio: str, spread=None) -> dict[str, str]:
    labels: dict[str, str] = {}
    for index, size in enumerate(sizes):
        for place, (name, row) in enumerate(size["variants"].items()):
            label, color = kind_of(name, row)
            labels[label] = color
            x, width = _place(index, place, len(size["variants"])), 0.84 / len(size["variants"])
            if not value(row):
                continue  # not measured, as the peak of a graph
            error = None if spread is None else [[part] for part in spread(row)]
            axis.bar(x, value(row), width, color=color, yerr=error, error_kw={"elinewidth": 0.8})
            if name == size["ours"] and ratio in size["ratios"]:
                axis.annotate(
                    f"{size['ratios'][ratio]:.1f}x",
                    (x, value(row) + (error[1][0] if error else 0.0)),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    fontweight="bold",
                )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * 1.3)
    axis.set_xticks(range(len(sizes)), [short(size["model"]) + _flag(size) for size in sizes])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)
    return labels


def _mark_saved(axis: Axes, sizes: list[dict]) -> None:
    for index, size in enumerate(sizes):
        for place, row in enumerate(size["variants"].values()):
            x = _place(index, place, len(size["variants"]))
            half = 0.36 / len(size["variants"])
            height = (row["saved_bytes"] or 0) / 2**20
            axis.plot([x - half, x + half], [height, height], color="black", linewidth=1.0, zorder=3)
