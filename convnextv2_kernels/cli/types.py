"""Numbers, sizes and names as the command line writes them: the types of all commands' options.

Each is a function of the text that argparse calls; its error message says what was expected and what was given.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import backends
from ..data import MAX_PIXELS
from ..sizes import CONFIGS, V2_NAMES

BACKENDS = ("auto", *(name for name in backends.NAMES if name != "auto"))
MODEL_PREFIX = "convnextv2_"
PATCH = 32  # pixels of a patch's side, which divides the image sides of masked pre-training


def number(kind: type, accept: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """A parser of one number for argparse; ``expected`` completes its error message."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive_int = number(int, lambda v: v > 0, "a whole number above 0")
nonnegative_int = number(int, lambda v: v >= 0, "a whole number, 0 or more")
positive_float = number(float, lambda v: 0 < v < math.inf, "a number above 0")
nonnegative_float = number(float, lambda v: 0 <= v < math.inf, "a number, 0 or more")
seconds = number(float, lambda v: 0 < v < math.inf, "a number of seconds above 0")
percentage = number(float, lambda v: 0 <= v < math.inf, "a percentage, 0 or more")
share = number(float, lambda v: 0 < v < 1, "a number between 0 and 1")
share_or_zero = number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
probability = number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
side = number(int, lambda v: v > 0 and v % PATCH == 0, f"a side in pixels, a multiple of {PATCH}")


def file_path(text: str) -> Path:
    """Of a file or a folder; an empty one would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text)


class ValueRange(argparse.Action):
    """``LOW HIGH`` as two numbers, or one of the words in ``metavar``'s place; for ``nargs="+"``."""

    WORDS = ("dtype", "percentile")

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store (low, high) or the word."""
        try:
            low, high = map(float, values)
        except ValueError:
            low = high = math.nan
        if len(values) == 1 and values[0] in self.WORDS:
            setattr(namespace, self.dest, values[0])
        elif low < high and math.isfinite(high - low):
            setattr(namespace, self.dest, (low, high))
        else:
            words = " or ".join(self.WORDS)
            raise argparse.ArgumentError(
                self, f"expected LOW HIGH with LOW below HIGH, {words}, got {' '.join(values)}"
            )


def add_decoding(group: Any) -> None:
    """Add the options that say how image files are decoded."""
    group.add_argument(
        "--value-range",
        action=ValueRange,
        nargs="+",
        metavar=("LOW", "HIGH"),
        help="for grey images of more than 8 bits: the values that become black and white; or dtype, the range of the "
        "type they are stored in; or percentile, from 0.5 %% to 99.5 %% of a sample's values, kept for the run "
        "(default: that of the weights that are read; else dtype for unsigned 12 and 16 bits, percentile for others, "
        "with a warning)",
    )
    group.add_argument(
        "--max-pixels",
        type=positive_int,
        metavar="N",
        help="leave out larger images without decoding them; a pixel of more than 8 bits counts as two (default: "
        f"{MAX_PIXELS})",
    )


def decay(text: str) -> float:
    """A factor of a moving average, or 0 for "off"."""
    return 0.0 if text == "off" else share(text)


def image_size(text: str) -> tuple[int, int]:
    """``S`` or ``HxW`` in pixels."""
    sides = text.lower().split("x")
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected a side or HxW in pixels, got {text!r}")
    return int(sides[0]), int(sides[1])


def model_name(text: str) -> str:
    """The full name of a size of V2, which may be given without :data:`MODEL_PREFIX`."""
    name = text if text.startswith(MODEL_PREFIX) else MODEL_PREFIX + text
    if name not in V2_NAMES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(V2_NAMES)}, got {text!r}")
    return name


def any_model_name(text: str) -> str:
    """The full name of a size of V2, as :func:`model_name` takes it, or of V1, such as ``convnext_tiny``."""
    if text in CONFIGS:
        return text
    try:
        return model_name(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(CONFIGS)}, got {text!r}") from None


def short_name(name: str) -> str:
    """A size's name as people say it, such as "atto"."""
    return name.removeprefix(MODEL_PREFIX)
