"""Curves and densities of several networks in one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .._console import plotted
from .._files import PNG_METADATA, atomic_file
from .cosine import LayerCosine
from .features import TAPS
from .selectivity import LayerSelectivity, selectivity_density

# Told apart by people who do not see all colours, and in grey by the markers (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1e293b")
MARKERS = "osD^vPX"
PANELS = 12


def save_cosine_plot(path: Path, curves: Mapping[str, Sequence[LayerCosine]], tap: str, title: str) -> None:
    """Figure 4: distance against the normalised layer index, one curve per network, and the share of dead channels.

    The band is one standard deviation over images to either side, the dashed curve the distance of live channels.
    """
    figure = _figure(8, 6.2, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    for number, (label, layers) in enumerate(curves.items()):
        look = _look(number)
        x = [layer.position for layer in layers]
        mean = np.array([layer.mean for layer in layers])
        std = np.nan_to_num([layer.std for layer in layers])
        upper.plot(x, mean, label=plotted(label), **look)
        upper.plot(x, [layer.live_mean for layer in layers], color=look["color"], lw=1, ls="--")
        upper.fill_between(x, (mean - std).clip(0), (mean + std).clip(max=0.5), color=look["color"], alpha=0.15, lw=0)
        lower.plot(x, [100 * layer.dead_share for layer in layers], **look)
    upper.plot([], [], color="#64748b", lw=1, ls="--", label="live channels only")
    upper.set_ylim(0, 0.525)
    upper.set_ylabel("feature cosine distance\n(0: all alike, 0.5: greatest)")
    lower.set_ylim(0, max(5.0, 1.1 * lower.dataLim.y1))
    lower.set_ylabel("dead channels (%)")
    lower.set_xlabel(f"normalised layer index (0: first block, 1: last); features {TAPS[tap]}")
    upper.legend(loc="best", fontsize=9, framealpha=0.9)
    for axis in (upper, lower):
        axis.set_xlim(-0.02, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_selectivity_plot(
    path: Path,
    curves: Mapping[str, Sequence[LayerSelectivity]],
    title: str,
    bins: int = 25,
    limits: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Figure 7: median and quartiles of the index by layer, and densities of up to twelve layers.

    The densities are over ``limits``; a panel says which share of the channels lies outside.
    Layers of networks of different depths are matched by name.
    """
    layers = max(curves.values(), key=len)
    chosen = sorted(set(np.linspace(0, len(layers) - 1, min(PANELS, len(layers))).round().astype(int).tolist()))
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = _figure(10, 3.0 + 1.9 * rows, title)
    above, below = figure.subfigures(2, 1, height_ratios=(2.6, 1.9 * rows + 0.3))
    summary = above.subplots()
    panels = below.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for number, (label, result) in enumerate(curves.items()):
        look = _look(number)
        x = np.arange(len(result)) / max(1, len(result) - 1)
        low, median, high = np.array([layer.quartiles() for layer in result]).T
        summary.plot(x, median, label=plotted(label), **look)
        summary.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        by_name = {layer.name: layer for layer in result}
        for index, panel in zip(chosen, panels, strict=False):
            if (layer := by_name.get(layers[index].name)) is not None:
                edges, density, outside = selectivity_density(layer.index_of_unit, bins, *limits)
                panel.stairs(density, edges, color=look["color"], lw=1.3)
                if outside:
                    panel.plot([], [], color=look["color"], label=f"{outside:.0%} outside")
    summary.set_xlim(-0.02, 1.02)
    if limits == (0.0, 1.0):
        summary.set_ylim(0, 1)
    summary.set_xlabel("normalised layer index (0: first block, 1: last)", fontsize=9)
    summary.set_ylabel("class selectivity index\nmedian, quartiles", fontsize=9)
    summary.legend(fontsize=9, framealpha=0.9, loc="best")
    for number, (index, panel) in enumerate(zip(chosen, panels, strict=False)):
        panel.set_title(layers[index].name, fontsize=9, pad=3)
        panel.set_xlim(*limits)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8, labelbottom=number + columns >= len(chosen))
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7, frameon=False)
    for panel in panels[len(chosen) :]:
        panel.set_axis_off()
    below.supxlabel("class selectivity index", fontsize=9)
    below.supylabel("density over channels", fontsize=9)
    for axis in (summary, *panels):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _look(number: int) -> dict:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.6,
    }


def _figure(width: float, height: float, title: str):
    # A Figure of one's own, not pyplot: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(plotted(title), fontsize=10)
    return figure


def _save(figure, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata=PNG_METADATA)
