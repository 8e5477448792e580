"""One value range for all grey images of more than 8 bits of a data set: chosen once, and stated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._console import visible
from .._progress import count
from ..errors import UserError
from . import MAX_PIXELS
from .decoding import ODDITIES, STORED, Traits, sample_values

WORDS = ("dtype", "percentile")
PERCENTILES = (0.5, 99.5)  # of nnU-Net's CT normalisation (Isensee et al. 2021)
SAMPLE_IMAGES, SAMPLE_VALUES = 256, 1 << 14  # of a data set, of an image

Range = tuple[float, float]


@dataclass(frozen=True)
class Chosen:
    """A data set's value range, None where no image has more than 8 bits; by which rule ("given", one of
    :data:`WORDS`, "recorded" with the weights, "assumed"); and what to tell the user."""

    value_range: Range | None = None
    rule: str | None = None
    notes: list[str] = field(default_factory=list)


def choose_range(
    wanted: Range | str | None,
    traits: Mapping[Path, Traits],
    recorded: Range | None = None,
    kept: Range | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Chosen:
    """Choose for a data set whose images of unusual ``traits`` are at these paths.

    ``wanted``: (low, high), "dtype" (the range of the stored type; 0 to 1 for floating point), "percentile" (over a
    sample of the images), or None: ``recorded``, the range of the weights that are trained on; without it that of the
    type for unsigned integers of up to 16 bits, else the percentiles, and a warning. ``kept``, the range that a run
    began with, stands in for what the images that are left would give.

    Raises:
        UserError: "dtype" for images of several types, or percentiles that are equal.
    """
    notes = [_oddity(key, traits) for key in ODDITIES if any(key in t.oddities for t in traits.values())]
    deep = {path: t for path, t in traits.items() if t.stored}
    if not deep:  # those that a run began with may be lost by now: it keeps its range
        return Chosen(None if isinstance(wanted, tuple) else kept, None, notes + _without_effect(wanted, recorded))
    types = sorted({t.stored for t in deep.values()})
    seen = min(t.low for t in deep.values()), max(t.high for t in deep.values())
    what = (
        f"{count(len(deep), 'image')} with grey values of more than 8 bits ({', '.join(types)}; the values seen are "
        f"{range_text(seen)})"
    )
    rule = wanted if isinstance(wanted, str) else "given" if wanted else "recorded" if recorded else "assumed"
    if rule in ("given", "recorded"):
        chosen = wanted if isinstance(wanted, tuple) else recorded
    elif kept:
        chosen = kept
    elif rule == "dtype" or (rule == "assumed" and types in (["uint12"], ["uint16"])):
        if len(types) > 1:
            raise UserError(f"--value-range dtype: the images store {', '.join(types)}; give --value-range LOW HIGH.")
        chosen = STORED[types[0]]
    else:
        chosen = _percentiles(list(deep), max_pixels)
    if rule == "assumed":
        by_type = "the range of the type" if types in (["uint12"], ["uint16"]) else "percentiles of the values"
        how = "as when the run began" if kept else by_type
        text = f"warning: {what}: assumed {range_text(chosen)}, {how}; --value-range sets it"
    else:
        text = f"note: {what}: mapped from {range_text(chosen)} ({_RULES[rule]})"
    if seen[0] < chosen[0] or seen[1] > chosen[1]:
        text += "; values outside are clipped"
    return Chosen((float(chosen[0]), float(chosen[1])), rule, [text, *notes])


_RULES = {
    "given": "--value-range",
    "dtype": "--value-range dtype",
    "percentile": "--value-range percentile",
    "recorded": "recorded with the weights",
}


def _without_effect(wanted: Range | str | None, recorded: Range | None) -> list[str]:
    if wanted is not None:
        return ["note: --value-range has no effect: no image has grey values of more than 8 bits"]
    if recorded is not None:
        return [
            f"note: the weights were trained on grey values of {range_text(recorded)}, and no image here has more than "
            "8 bits"
        ]
    return []


def _oddity(key: str, traits: Mapping[Path, Traits]) -> str:
    of = [path for path, t in traits.items() if key in t.oddities]
    peak = f"; the greatest is {max(traits[path].high for path in of):g} of 255" if key == "deep colour" else ""
    return f"warning: {count(len(of), 'image')} (the first: {visible(str(of[0]))}) {ODDITIES[key]}{peak}"


def _percentiles(paths: list[Path], max_pixels: int) -> Range:
    """Over images at even distances in their order, so that the same files give the same range."""
    parts = []
    for path in paths[:: max(1, -(-len(paths) // SAMPLE_IMAGES))]:
        try:
            parts.append(sample_values(path, SAMPLE_VALUES, max_pixels))
        except Exception:  # Pillow's; it is reported where the file is needed as an image
            continue
    values = np.concatenate(parts) if parts else np.empty(0)
    low, high = np.percentile(values, PERCENTILES).tolist() if values.size else (0.0, 0.0)
    if not low < high < math.inf:
        raise UserError(
            f"nearly all grey values of more than 8 bits in {count(len(parts), 'image')} are {low:g}, which gives no "
            "range; give --value-range LOW HIGH."
        )
    return low, high


def range_text(value_range: Range) -> str:
    """A range for people and for the metadata of weights, exact: "-1000 to 3071"."""
    return " to ".join(str(int(v)) if float(v).is_integer() and abs(v) < 1e15 else repr(float(v)) for v in value_range)


def range_of(recorded: Any) -> Range | None:
    """A range out of a config (a list) or metadata (text), None where there is none or it makes no sense."""
    if isinstance(recorded, str):
        recorded = recorded.split(" to ")
    try:
        low, high = map(float, recorded)
    except (TypeError, ValueError, OverflowError):
        return None
    return (low, high) if -math.inf < low < high < math.inf else None


def differing_range(used: Range | None, recorded: Range | None, weights: str) -> list[str]:
    """A warning where images are mapped from another range than those that ``weights`` were trained on."""
    if used is None or recorded is None or used == recorded:
        return []
    return [
        f"warning: {weights} was trained on grey values of {range_text(recorded)}, and these are mapped from "
        f"{range_text(used)}"
    ]
