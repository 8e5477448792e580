"""``analyze``: the analyses of what networks have learned, one subcommand each.

A subcommand is one function in :data:`ANALYSES`, which adds its parser and sets ``run``, a function of the parsed
arguments that returns the exit code.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .exit_codes import printing_is_optional, require_packages, user_errors
from .types import (
    BACKENDS,
    add_decoding,
    file_path,
    image_size,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
    seconds,
    share,
    share_or_zero,
)

TAPS = ("act", "grn", "block")
PACKAGES = ("numpy", "PIL", "rich")
PROG = "python -m convnextv2_kernels analyze"


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand with its own subcommands."""
    parser = commands.add_parser(
        "analyze",
        help="look into trained networks: feature diversity, class selectivity, activation maps, reconstructions, "
        "kNN and linear probe",
        description="Analyse what networks have learned, as the ConvNeXt V2 paper does.",
        epilog="More on an analysis: ANALYSIS --help. Definitions: docs/analysis.md.",
    )
    analyses = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)
    for add in ANALYSES:
        add(analyses)


def add_cosine(commands: Any) -> None:
    """Figure 4."""
    parser = _add(
        commands,
        "cosine",
        "feature cosine distance of every layer (Figure 4)",
        "Mean pairwise cosine distance of the channels of each layer, averaged over images: cosine.png, .csv, .json.\n"
        "0: all channels are alike; 0.5: the greatest possible. Channels that do nothing count as different from all\n"
        "others, so their share and the distance without them are shown beside it.",
        "RUN/checkpoint-1000.pt OTHER/checkpoint-1000.pt --label 'with GRN' --label 'without' --data val\n"
        f"  {PROG} cosine RUN/checkpoint-1000.pt timm:vit_base_patch16_224.mae@mae.pth --tap act --data val",
    )
    _add_networks(parser, random=True, timm=True)
    _add_images(parser, photos=True, images=1000)
    _add_tap(parser, "grn")
    _add_dead(parser)
    parser.set_defaults(run=_run("run_cosine"))


def add_selectivity(commands: Any) -> None:
    """Figure 7."""
    parser = _add(
        commands,
        "selectivity",
        "class selectivity index of every channel (Figure 7)",
        "How much one class drives each channel (Morcos et al. 2018), for every layer: selectivity.png, .csv, .json.\n"
        "Every direct subfolder of --data is a class.",
        "encoder.safetensors --random --data val",
    )
    _add_networks(parser, random=True, timm=True)
    _add_images(parser, photos=False, images=None)
    _add_tap(parser, "block")
    parser.add_argument(
        "--rectify",
        choices=("relu", "abs", "none"),
        default="relu",
        help="what is done to the maps first; with none the index leaves 0..1 (default: %(default)s)",
    )
    parser.add_argument(
        "--eps", type=nonnegative_float, default=0.0, metavar="X", help="added to the denominator (default: 0)"
    )
    parser.add_argument(
        "--shuffled",
        action="store_true",
        help="add each network under labels drawn at random, for the index that chance alone gives",
    )
    parser.set_defaults(run=_run("run_selectivity"))


def add_activations(commands: Any) -> None:
    """Figure 3."""
    parser = _add(
        commands,
        "activations",
        "activation maps of a layer for one image (Figure 3)",
        "Maps of some channels of one layer, with dead and saturated ones marked and counted: a PNG and a CSV for\n"
        "each network and layer, and activations.json.",
        "encoder.safetensors --photos --image coffee --layer stages.2.5 stages.3.1 --tap act",
    )
    _add_networks(parser, random=True, timm=True)
    _add_images(parser, photos=True, images=None, several=False)
    parser.add_argument(
        "--image", default="0", metavar="NAME|N", help="which image: its name, or its place from 0 (default: 0)"
    )
    parser.add_argument(
        "--layer", nargs="+", metavar="stages.S.B", help="blocks to show (default: the last block of the third stage)"
    )
    _add_tap(parser, "grn")
    parser.add_argument(
        "--channels", type=positive_int, default=64, metavar="N", help="maps to show (default: %(default)s)"
    )
    parser.add_argument(
        "--order", choices=("first", "random"), default="first", help="which channels (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        choices=("shared", "map"),
        default="shared",
        help="one colour scale for all maps, or each map stretched by itself, which hides dead maps "
        "(default: %(default)s)",
    )
    _add_dead(parser)
    parser.add_argument(
        "--saturated",
        type=share_or_zero,
        default=0.05,
        metavar="X",
        help="a map is saturated if its deviation is at most this share of its mean (default: %(default)s)",
    )
    parser.set_defaults(run=_run("run_activations"))


def add_reconstruct(commands: Any) -> None:
    """Reconstructions."""
    parser = _add(
        commands,
        "reconstruct",
        "fill in the hidden patches of given images",
        "Reconstructions by an FCMAE training checkpoint under masks that depend on the seed and the image's place\n"
        "alone: a PNG for each network, and reconstruction.csv and .json with the errors of each image.",
        "RUN/checkpoint-1000.pt --photos --mask-ratio 0.75",
    )
    _add_networks(parser, random=False)
    _add_images(parser, photos=True, images=8)
    parser.add_argument(
        "--mask-ratio",
        type=share_or_zero,
        metavar="R",
        help="hidden share of the patches (default: that of the training)",
    )
    parser.set_defaults(run=_run("run_reconstruct"))


def add_knn(commands: Any) -> None:
    """Nearest neighbours of frozen features."""
    parser = _add(
        commands,
        "knn",
        "classify by the nearest neighbours of frozen features",
        "Weighted k-nearest-neighbour classification on cosine similarity (Wu et al. 2018) of the last stage,\n"
        "averaged over its sites: knn.csv and knn.json. --data holds a subfolder for each class, or train/ and val/.",
        "run1/encoder.safetensors --random --data flowers",
    )
    _add_networks(parser, random=True)
    _add_labelled(parser)
    parser.add_argument("--k", type=positive_int, default=20, metavar="N", help="neighbours (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=positive_float,
        default=0.07,
        metavar="T",
        help="a neighbour of similarity s weighs exp(s / T) (default: %(default)s)",
    )
    parser.set_defaults(run=_run("run_knn"))


def add_probe(commands: Any) -> None:
    """Linear probe of frozen features."""
    parser = _add(
        commands,
        "probe",
        "train a linear classifier on frozen features",
        "Multinomial logistic regression on the standardised average of the last stage, by scikit-learn: probe.csv\n"
        "and probe.json. --data as for knn.",
        "run1/encoder.safetensors --random --data flowers",
    )
    _add_networks(parser, random=True)
    _add_labelled(parser)
    parser.add_argument(
        "--C",
        "--c",
        dest="c",
        type=positive_float,
        default=1.0,
        metavar="X",
        help="inverse of the L2 penalty (default: %(default)s)",
    )
    parser.add_argument(
        "--max-iter", type=positive_int, default=1000, metavar="N", help="of L-BFGS (default: %(default)s)"
    )
    parser.set_defaults(run=_run("run_probe"))


ANALYSES: tuple[Callable[[Any], None], ...] = (
    add_cosine,
    add_selectivity,
    add_activations,
    add_reconstruct,
    add_knn,
    add_probe,
)


def _add_networks(parser: argparse.ArgumentParser, random: bool, timm: bool = False) -> None:
    """Add the checkpoints and how they are run; with ``random``, ``--random``; ``timm``: its networks are taken too."""
    parser.add_argument(
        "checkpoints",
        nargs="*" if random else "+",
        type=file_path,
        metavar="CHECKPOINT",
        help="checkpoint of any known format; several are compared"
        + (
            "; or a network of timm: timm:NAME@FILE with the weights of a file, timm:NAME@random, or timm:NAME with "
            "timm's weights from the cache of this machine (nothing is downloaded)"
            if timm
            else ""
        ),
    )
    parser.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="name of a network in plots; once for each checkpoint, in order (default: the end of its path)",
    )
    parser.add_argument("--model", metavar="NAME", help="size that the checkpoints are expected to be, as of pretrain")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of training checkpoints")
    if random:
        parser.add_argument(
            "--random",
            action="store_true",
            help="add an untrained network of the size of the first checkpoint, or of --model",
        )
    parser.add_argument("--seed", type=nonnegative_int, default=0, metavar="N", help="of all draws (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--backend", choices=BACKENDS, help="kernels to use (default: the fastest that can run)")


def _add_images(parser: argparse.ArgumentParser, photos: bool, images: int | None, several: bool = True) -> None:
    """Add where images come from, and for ``several`` how many; ``photos``: the bundled ones may be taken."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--data", type=file_path, metavar="FOLDER", help="folder of images, with its subfolders")
    if photos:
        group.add_argument(
            "--photos", action="store_true", help="the photographs that come with scikit-image and scikit-learn"
        )
    parser.add_argument(
        "--output", type=file_path, default="analysis_output", metavar="DIR", help="for results (default: %(default)s)"
    )
    parser.add_argument(
        "--img-size",
        type=_image_size,
        metavar="S|HxW",
        help="pixels of the centred crops (default: those of the first checkpoint's training, else 224)",
    )
    add_decoding(parser)
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


def _add_labelled(parser: argparse.ArgumentParser) -> None:
    """Add a folder of classes to learn from, and one to test on."""
    parser.add_argument("--data", type=file_path, required=True, metavar="FOLDER", help="folder of classes")
    parser.add_argument(
        "--val",
        type=file_path,
        metavar="FOLDER",
        help="classes to test on (default: FOLDER/val, or a share of each class)",
    )
    parser.add_argument(
        "--val-share",
        type=share,
        default=0.2,
        metavar="R",
        help="share of each class to test on where there is no such folder (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=file_path, default="analysis_output", metavar="DIR", help="for results (default: %(default)s)"
    )
    parser.add_argument(
        "--img-size",
        type=_image_size,
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
    parser.add_argument(
        "--loader-timeout",
        type=seconds,
        default=300.0,
        metavar="S",
        help="end where no image could be read for S seconds, as on a network file system that hangs (default: "
        "%(default)g)",
    )
    add_decoding(parser)


def _add_tap(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--tap``."""
    parser.add_argument(
        "--tap",
        choices=TAPS,
        default=default,
        help="where features are read: after GELU (4C channels), after GRN (4C), output of the block "
        "(default: %(default)s)",
    )


def _add_dead(parser: argparse.ArgumentParser) -> None:
    """Add ``--dead``."""
    parser.add_argument(
        "--dead",
        type=share_or_zero,
        default=0.01,
        metavar="X",
        help="a channel is dead in an image if it never exceeds this share of the layer's root mean square "
        "(default: %(default)s)",
    )


def _image_size(text: str) -> tuple[int, int]:
    """``S`` or ``HxW`` in pixels, of at least 32."""
    size = image_size(text)
    if min(size) < 32:
        raise argparse.ArgumentTypeError(f"expected a side or HxW in pixels, of at least 32, got {text!r}")
    return size


def _run(name: str) -> Callable[[argparse.Namespace], int]:
    """The function ``name`` of :mod:`convnextv2_kernels.analysis.commands`, which is imported when it is called."""

    def run(args: argparse.Namespace) -> int:
        require_packages(f"analyze {args.analysis}", PACKAGES)
        printing_is_optional()
        with user_errors(OSError, ValueError):
            command = getattr(import_module("convnextv2_kernels.analysis.commands"), name)
            from ..train.config import in_options

            try:
                return command(args)
            except ValueError as error:
                raise ValueError(in_options(str(error), vars(args).keys() - {"images"})) from error

    return run


def _add(commands: Any, name: str, short: str, text: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help=short,
        description=text,
        epilog=f"example:\n  {PROG} {name} {example}",
    )
