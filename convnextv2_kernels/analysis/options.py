"""Options that several analyses share. Only argparse and the standard library are imported here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..cli.types import BACKENDS, nonnegative_float, nonnegative_int, number, positive_float, positive_int
from ..cli.types import image_size as any_image_size
from ..cli.types import share as positive_share

__all__ = [
    "add_dead",
    "add_images",
    "add_labelled",
    "add_networks",
    "add_tap",
    "nonnegative_float",
    "positive_float",
    "positive_int",
    "share",
]

TAPS = ("act", "grn", "block")


def add_networks(parser: argparse.ArgumentParser, random: bool) -> None:
    """Add the checkpoints and how they are run; with ``random``, ``--random``."""
    parser.add_argument(
        "checkpoints",
        nargs="*" if random else "+",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint of any known format; several are compared",
    )
    parser.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="name of a network in plots; once for each checkpoint, in order (default: the end of its path)",
    )
    parser.add_argument("--model", metavar="NAME", help="convnextv2_<size> that the checkpoints are expected to be")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of training checkpoints")
    if random:
        parser.add_argument(
            "--random",
            action="store_true",
            help="add an untrained network of the size of the first checkpoint, or of --model",
        )
    parser.add_argument("--seed", type=nonnegative_int, default=0, metavar="N", help="of all draws (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--backend", choices=BACKENDS, help="kernels to use (default: the fastest that serve)")


def add_images(parser: argparse.ArgumentParser, photos: bool, images: int | None, several: bool = True) -> None:
    """Add where images come from, and for ``several`` how many; ``photos``: the bundled ones may be taken."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--data", type=Path, metavar="FOLDER", help="folder of images, with its subfolders")
    if photos:
        group.add_argument(
            "--photos", action="store_true", help="the photographs that come with scikit-image and scikit-learn"
        )
    parser.add_argument(
        "--output", type=Path, default=Path("analysis_output"), metavar="DIR", help="for results (default: %(default)s)"
    )
    parser.add_argument(
        "--img-size",
        type=image_size,
        metavar="S|HxW",
        help="pixels of the centred crops (default: those of the first checkpoint's training, else 224)",
    )
    if several:
        order = "one of each subfolder by turns" if photos else "one of each class by turns"
        parser.add_argument(
            "--images",
            type=positive_int,
            default=images,
            metavar="N",
            help=f"how many at most, {order} (default: {images or 'all'})",
        )
        parser.add_argument(
            "--batch-size", type=positive_int, default=16, metavar="B", help="images at a time (default: %(default)s)"
        )
        parser.add_argument(
            "--workers",
            type=positive_int,
            default=min(4, os.cpu_count() or 1),
            metavar="N",
            help="threads that decode images (default: one per core, 4 at most)",
        )


def add_labelled(parser: argparse.ArgumentParser) -> None:
    """Add a folder of classes to learn from, and one to test on."""
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of classes")
    parser.add_argument(
        "--val", type=Path, metavar="FOLDER", help="classes to test on (default: FOLDER/val, or a share of each class)"
    )
    parser.add_argument(
        "--val-share",
        type=positive_share,
        default=0.2,
        metavar="R",
        help="share of each class to test on where there is no such folder (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("analysis_output"), metavar="DIR", help="for results (default: %(default)s)"
    )
    parser.add_argument(
        "--img-size",
        type=image_size,
        metavar="S|HxW",
        help="pixels (default: those of the first checkpoint's training, else 224)",
    )
    parser.add_argument(
        "--crop-pct", type=positive_float, metavar="R", help="as for finetune (default: 224/256 below 384 px)"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=64, metavar="B", help="images at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=nonnegative_int, default=0, metavar="N", help="processes that decode (default: %(default)s)"
    )


def add_tap(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--tap``."""
    parser.add_argument(
        "--tap",
        choices=TAPS,
        default=default,
        help="where features are read: after GELU (4C channels), after GRN (4C), output of the block "
        "(default: %(default)s)",
    )


def add_dead(parser: argparse.ArgumentParser) -> None:
    """Add ``--dead``."""
    parser.add_argument(
        "--dead",
        type=share,
        default=0.01,
        metavar="X",
        help="a channel is dead in an image if it never exceeds this share of the layer's root mean square "
        "(default: %(default)s)",
    )


share = number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def image_size(text: str) -> tuple[int, int]:
    """``S`` or ``HxW`` in pixels, of at least 32."""
    size = any_image_size(text)
    if min(size) < 32:
        raise argparse.ArgumentTypeError(f"expected a side or HxW in pixels, of at least 32, got {text!r}")
    return size
