"""How far each op is from what the machine can do: one chart for each model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convnextv2_kernels._files import atomic_file
from convnextv2_kernels.benchmark.report import machine_line
from convnextv2_kernels.benchmark.variants import SPARSE


def save_limits(path: Path, result: dict) -> None:
    """Write a PNG: ops by stages, each cell the share of the time that its counted work must take.

    A small share is a kernel far from its limit. M and C say whether memory or computing sets the limit; the second
    line is the time and how many times the fastest dense variant takes.
    """
    ops = result["ops"]
    models = [model for model in ops if ops[model]["rows"]]
    names = list(dict.fromkeys(row["op"] for model in models for row in ops[model]["rows"]))
    figure = Figure(figsize=(2.0 + 5.2 * len(models), 1.6 + 0.62 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Counted minimum over measured time (M: of memory, C: of computing), forward and backward; "
        "below it the time, and that of the fastest dense variant over it\n"
        f"{machine_line(result)}",
        fontsize=11,
    )
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        _draw(axis, model, ops[model]["rows"], names)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _draw(axis, model: str, rows: list[dict], names: list[str]) -> None:
    stages = list(dict.fromkeys((row["width"], row["side"]) for row in rows))
    shares = np.full((len(names), len(stages)), np.nan)
    for row in rows:
        place = names.index(row["op"]), stages.index((row["width"], row["side"]))
        variant = row["variants"][SPARSE]
        shares[place] = variant["share"]
        limit = f"{100 * variant['share']:.0f} % {variant['bound'][0].upper()}"
        axis.text(
            place[1],
            place[0],
            f"{limit}\n{variant['median_ms']:.2f} ms, {row['time_ratio']:.1f}x",
            ha="center",
            va="center",
            fontsize=8,
        )
    axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75)
    axis.set_xticks(range(len(stages)), [f"C={width} s={side}" for width, side in stages], fontsize=9)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_title(model, fontsize=10, loc="left")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
