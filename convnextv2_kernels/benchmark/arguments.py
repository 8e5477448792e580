"""Types of the command line's options, shared by the modes of the benchmark."""

from __future__ import annotations

import argparse

from ..models import CONFIGS
from .baseline import PATCH

PREFIX = "convnextv2_"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def image_size(text: str) -> int:
    """A side in pixels, a multiple of the patch."""
    size = positive(text)
    if size % PATCH:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {PATCH}")
    return size


def seconds(text: str) -> float:
    """A positive time."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def fraction(text: str) -> float:
    """A share of the patches that leaves something visible."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def model(text: str) -> str:
    """Full name of a size."""
    name = text if text.startswith(PREFIX) else PREFIX + text
    if name not in CONFIGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(CONFIGS)}")
    return name


def short(name: str) -> str:
    """A size's name as people say it, such as "atto"."""
    return name.removeprefix(PREFIX)
