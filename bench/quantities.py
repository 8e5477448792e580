"""The numbers of a result under readable names, whatever kind of result it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from convnextv2_kernels.benchmark.results import NotAResult

# Descriptions of the run, counted work, checks of correctness, fits: no measurements.
_SKIPPED = {
    "machine",
    "parameters",
    "software",
    "correctness",
    "control",
    "allocator",
    "work",
    "flops",
    "rates",
    "ratios",
    "skipped",
    "baseline",
    "default_allocator",
}
_SKIPPED |= {"ideal", "fit", "left_out", "ceilings", "limit_ms", "probe_ms", "effort", "git", "parameters_bytes"}
# Levels that say nothing about a number.
_SILENT = {"variants", "points", "rows", "series", "sizes"}
# Names of an entry of a list, in the order in which they are read.
_NAMES = ("library", "model", "op", "kernel", "name", "backend", "axis")
_SIZES = (("width", "C="), ("side", "s="), ("rows", "rows="), ("channels", "C="))
_SEPARATOR = " / "


@dataclass(frozen=True)
class Quantity:
    """One measured number.

    Attributes:
        value, unit: the number, in "ms", "bytes", "images/s", "instructions" or "calls".
        low, high: quartiles where there are some, else the value.
        noisy: whether it changes from run to run: times, rates, resident memory.
    """

    value: float
    unit: str
    low: float
    high: float
    noisy: bool

    @property
    def more_is_better(self) -> bool:
        return self.unit == "images/s"


def flatten(result: dict) -> dict[str, Quantity]:
    """Every measured number of a result, under a key such as ``step / convnextv2_atto / sparse / median_ms``.

    Entries of lists are named by what they are (model, op and size, value of an axis), not by their place. A median
    carries its quartiles; other statistics of the same samples are left out. Raises NotAResult when two share a key.
    """
    found: dict[str, Quantity] = {}
    for key, quantity in _walk(result, ()):
        if key in found:
            raise NotAResult(f"two numbers of the result are called {key!r}")
        found[key] = quantity
    return found


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Quantity]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _SKIPPED:
                continue
            if _is_number(item):
                quantity = _quantity(key, value, path)
                if quantity is not None:
                    yield _SEPARATOR.join((*path, key)), quantity
            else:
                inner = _points(value, item) if key == "points" else item
                yield from _walk(inner, path if key in _SILENT else (*path, key))
    elif isinstance(value, list):
        taken: dict[str, int] = {}
        for place, item in enumerate(value):
            if not isinstance(item, dict | list):
                continue  # samples
            name = _name(item) or f"#{place + 1}"
            taken[name] = taken.get(name, 0) + 1
            yield from _walk(item, (*path, name if taken[name] == 1 else f"{name} #{taken[name]}"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _points(series: dict, points: Any) -> Any:
    """The points of a series, each named by its place on the axis."""
    axis = series.get("axis")
    if not isinstance(axis, str) or not isinstance(points, list):
        return points
    named = []
    for point in points:
        if isinstance(point, dict) and "name" not in point:
            at = point.get(axis, point.get("value"))
            point = point if at is None else {"name": f"{axis}={at}", **point}
        named.append(point)
    return named


def _name(item: Any) -> str | None:
    if not isinstance(item, dict):
        return None
    words = [item[name] for name in _NAMES if isinstance(item.get(name), str)]
    words += [f"{mark}{item[name]}" for name, mark in _SIZES if _is_number(item.get(name))]
    return " ".join(words) or None


def _quantity(key: str, siblings: dict, path: tuple[str, ...]) -> Quantity | None:
    value = siblings[key]
    if key.endswith("_ms"):
        return _time(key, value, siblings)
    if key.endswith("_per_s"):
        return _rate(key, value, siblings)
    if key == "bytes" or key.endswith("_bytes"):
        # what the system says is resident, and oneDNN's scratch in a point of --scaling, unlike what is counted
        resident = key == "bytes" and bool(path) and path[-1] == "peak"
        scratch = key in ("peak_bytes", "working_bytes") and "hidden" in siblings
        return Quantity(value, "bytes", value, value, resident or scratch)
    for unit in ("instructions", "calls"):
        if key == unit or key.endswith(f"_{unit}"):
            return Quantity(value, unit, value, value, False)
    return None


def _time(key: str, value: float, siblings: dict) -> Quantity | None:
    stem, _, statistic = key.removesuffix("_ms").rpartition("_")
    prefix = f"{stem}_" if stem else ""
    if statistic in ("q1", "q3", "min", "max", "mean") and f"{prefix}median_ms" in siblings:
        return None
    quartiles = [siblings.get(f"{prefix}{name}_ms") for name in ("q1", "q3")]
    if statistic != "median" or not all(_is_number(q) for q in quartiles):
        return Quantity(value, "ms", value, value, True)
    return Quantity(value, "ms", min(quartiles), max(quartiles), True)


def _rate(key: str, value: float, siblings: dict) -> Quantity:
    """A rate follows from the median time beside it, and so does its noise."""
    prefix = key.removesuffix("_per_s").removesuffix("images")
    unit = "images/s" if key.endswith("images_per_s") else f"{key.removesuffix('_per_s')}/s"
    times = [siblings.get(f"{prefix}{name}_ms") for name in ("median", "q1", "q3")]
    if not all(_is_number(t) and t > 0 for t in times):
        return Quantity(value, unit, value, value, True)
    median, q1, q3 = times
    return Quantity(value, unit, value * median / q3, value * median / q1, True)
