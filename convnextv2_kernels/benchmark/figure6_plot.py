"""The two panels of Figure 6: throughput and memory by model size."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .._atomic_io import atomic_file
from .arguments import short
from .figure6 import peak_of
from .figure6_report import title

_COMMON = "#e2e8f0"
_DENSE = {
    ("nchw", False): "#cbd5e1",
    ("channels_last", False): "#94a3b8",
    ("nchw", True): "#64748b",
    ("channels_last", True): "#334155",
}
_OURS = {"reference": "#fdba74", "cpu": "#c2410c", "triton": "#ea580c", "cuda": "#c2410c", "auto": "#9a3412"}


SIDE_BY_SIDE = 4  # more sizes than these: one panel above the other, so that a page can hold them


def kind_of(name: str, arm: dict) -> tuple[str, str]:
    """Label and color of an arm, the same for every size."""
    variant = arm["variant"]
    if variant is None:
        backend = name.rpartition(" ")[2]
        return f"sparse, {backend}", _OURS[backend]
    if variant["pointwise"] == "plain" and not variant["compiled"]:
        return "masked dense, as commonly written", _COMMON
    label = f"masked dense, {variant['layout']}{', compiled' if variant['compiled'] else ''}"
    return label, _DENSE[variant["layout"], variant["compiled"]]


def save_plot(path: Path, result: dict) -> None:
    """Write a PNG: grouped bars on a logarithmic axis, ratios to the best dense arm over ours."""
    sizes = result["sizes"]
    stacked = len(sizes) > SIDE_BY_SIDE
    across = 3.0 + (1.1 if stacked else 2.0) * len(sizes)
    figure = Figure(figsize=(max(9.0, across), 9.2 if stacked else 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title(result), fontsize=10)
    left, right = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
    labels = _draw(left, sizes, lambda arm: arm["images_per_s"], "throughput", _relative_spread)
    left.set_ylabel("images / s (median, quartiles), log scale")
    left.set_title("Throughput; in bold: ours / fastest dense", fontsize=10, loc="left")
    weighed = all(peak_of(arm) for size in sizes for arm in size["arms"].values())
    if weighed:
        _mark_saved(right, sizes)
        _draw(right, sizes, lambda arm: peak_of(arm) / 2**20, "peak")
    else:
        _draw(right, sizes, lambda arm: arm["saved_bytes"] / 2**20, "saved")
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
        figure.savefig(file, format="png", dpi=130)


def _relative_spread(arm: dict) -> tuple[float, float]:
    rate = arm["images_per_s"]
    return rate - rate * arm["median_ms"] / arm["q3_ms"], rate * arm["median_ms"] / arm["q1_ms"] - rate


def _place(size: int, arm: int, arms: int) -> float:
    return size + (arm - (arms - 1) / 2) * 0.84 / arms


def _draw(axis: Axes, sizes: list[dict], value, ratio: str, spread=None) -> dict[str, str]:
    labels: dict[str, str] = {}
    for index, size in enumerate(sizes):
        for place, (name, arm) in enumerate(size["arms"].items()):
            label, color = kind_of(name, arm)
            labels[label] = color
            x, width = _place(index, place, len(size["arms"])), 0.84 / len(size["arms"])
            error = None if spread is None else [[part] for part in spread(arm)]
            axis.bar(x, value(arm), width, color=color, yerr=error, error_kw={"elinewidth": 0.8})
            if name == size["ours"] and ratio in size["ratios"]:
                axis.annotate(
                    f"{size['ratios'][ratio]:.1f}x",
                    (x, value(arm) + (error[1][0] if error else 0.0)),
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
    axis.set_xticks(range(len(sizes)), [short(size["model"]) for size in sizes])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)
    return labels


def _mark_saved(axis: Axes, sizes: list[dict]) -> None:
    for index, size in enumerate(sizes):
        for place, arm in enumerate(size["arms"].values()):
            x = _place(index, place, len(size["arms"]))
            half = 0.36 / len(size["arms"])
            height = arm["saved_bytes"] / 2**20
            axis.plot([x - half, x + half], [height, height], color="black", linewidth=1.0, zorder=3)
