"""Bars of step time and of bytes saved for backward."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .._atomic_io import atomic_file
from .report import machine_line
from .variants import SPARSE

_COLORS = {"sparse": "#c2410c", "eager": "#64748b", "compile": "#94a3b8"}


def save_plot(path: Path, result: dict) -> None:
    """Write a PNG with one row for each model: medians with quartiles, and saved bytes."""
    steps = result["step"]
    bars = max(len(step["arms"]) for step in steps)
    height = 1.0 + len(steps) * (1.1 + 0.34 * bars)
    figure = Figure(figsize=(12.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"FCMAE training step: {machine_line(result)}", fontsize=12)
    axes = figure.subplots(len(steps), 2, squeeze=False)
    for step, (left, right) in zip(steps, axes, strict=True):
        _draw_times(left, step)
        _draw_bytes(right, step)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _kind(name: str) -> str:
    return SPARSE if name == SPARSE else name.rsplit(" ", 1)[1]


def _bars(axis, step: dict, values: list[float], labels: list[str], title: str, errors=None):
    names = list(step["arms"])
    colors = [_COLORS[_kind(name)] for name in names]
    axis.barh(range(len(names)), values, color=colors, xerr=errors, ecolor="#1e293b", capsize=2)
    ends = values if errors is None else [v + e for v, e in zip(values, errors[1], strict=True)]
    for position, (end, label) in enumerate(zip(ends, labels, strict=True)):
        axis.annotate(label, (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22 * max(ends))
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_times(axis, step: dict) -> None:
    arms = list(step["arms"].values())
    medians = [arm["median_ms"] for arm in arms]
    below = [arm["median_ms"] - arm["q1_ms"] for arm in arms]
    above = [arm["q3_ms"] - arm["median_ms"] for arm in arms]
    title = f"{step['model']}: time, fastest dense / sparse = {step['time_ratio']:.2f}"
    labels = [f"{m:.0f}" if m >= 100 else f"{m:.1f}" for m in medians]
    _bars(axis, step, medians, labels, title, [below, above])
    axis.set_xlabel("milliseconds (median, quartiles)", fontsize=9)


def _draw_bytes(axis, step: dict) -> None:
    sizes = [arm["saved_bytes"] / 2**20 for arm in step["arms"].values()]
    title = f"saved for backward, least dense / sparse = {step['saved_ratio']:.1f}"
    _bars(axis, step, sizes, [f"{s:.0f}" if s >= 100 else f"{s:.1f}" for s in sizes], title)
    axis.set_xlabel("MiB", fontsize=9)
    axis.set_yticklabels([])
