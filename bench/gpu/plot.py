"""A picture: kernels' shares of copy bandwidth, and how many times slower the dense step is."""

from __future__ import annotations

import importlib.util
from typing import Any

from .results import Recorder
from .setting import Setting, Skip

MOST_KERNELS = 40
COLORS = {True: "#15803d", False: "#b91c1c", None: "#64748b"}


def kernel_bars(stages: dict[str, Any]) -> list[tuple[str, float, bool | None]]:
    """(name, cold share, target met) of our own kernels of the first model that are large enough to judge, or of all
    where none is."""
    rows = stages.get("kernels", {}).get("result", {}).get("kernels", {})
    own = {name: row for name, row in rows.items() if not name.startswith("torch ")}
    judged = {name: row for name, row in own.items() if "met" in row} or own
    return [(name, row["copy_share_cold"], row.get("met")) for name, row in judged.items()][:MOST_KERNELS]


def step_bars(stages: dict[str, Any]) -> list[tuple[str, float]]:
    """(comparison, ratio) of every measured step."""
    bars = []
    for stage, group in (("step", "eager"), ("step", "graph"), ("compile", "compile")):
        for name, row in stages.get(stage, {}).get("result", {}).get(group, {}).items():
            mark = "" if row["control"]["valid"] else " (INVALID control)"
            bars += [(f"{name}{mark}", value) for key, value in row["ratios"].items() if key == "throughput"]
    direct = stages.get("step", {}).get("result", {}).get("dense_eager_over_ours_graph", {})
    return bars + [(f"{name} dense eager / our graph", value) for name, value in direct.items()]


def draw(data: dict[str, Any], path) -> None:
    """Writes the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kernels, steps = kernel_bars(data["stages"]), step_bars(data["stages"])
    name = data["stages"].get("machine", {}).get("result", {}).get("gpu", {}).get("name", "unknown GPU")
    figure = Figure(figsize=(14, 1.5 + 0.22 * max(len(kernels), len(steps), 8)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{name}, bf16" + (" (dry run: times mean nothing)" if data["dry_run"] else ""))
    left, right = figure.subplots(1, 2)
    _bars(left, [k[0] for k in kernels], [100 * k[1] for k in kernels], [COLORS[k[2]] for k in kernels])
    left.set_xlabel("share of measured copy bandwidth, cold buffers, % (green: target met)")
    left.axvline(100, color="#94a3b8", linewidth=0.8)
    _bars(right, [s[0] for s in steps], [s[1] for s in steps], ["#c2410c"] * len(steps))
    right.set_xlabel("time of the fastest masked dense step / ours")
    figure.savefig(path, dpi=110)


def _bars(axis, names: list[str], values: list[float], colors: list[str]) -> None:
    axis.barh(range(len(names)), values, color=colors)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    for position, value in enumerate(values):
        axis.annotate(
            f"{value:.3g}", (value, position), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
        )


def run(setting: Setting, recorder: Recorder) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise Skip("matplotlib is not installed")
    if not kernel_bars(recorder.results.data["stages"]) and not step_bars(recorder.results.data["stages"]):
        raise Skip("there is nothing to draw")
    path = setting.folder / "gpu_check.png"
    draw(recorder.results.data, path)
    recorder.put(file=path.name)
