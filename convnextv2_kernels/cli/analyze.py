"""The command line of the analyses: ``python -m convnextv2_kernels analyze SUBCOMMAND``.

Only argparse and the standard library are imported here. A subcommand is one function in :data:`COMMANDS`, which adds
its parser and sets ``run``, a function of the parsed arguments that returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..analysis.options import (
    add_dead,
    add_images,
    add_labelled,
    add_networks,
    add_tap,
    nonnegative_float,
    positive_float,
    positive_int,
    share,
)

PROG = "python -m convnextv2_kernels analyze"
# Modules an analysis imports that plain use of the kernels does not need, and what installs them.
PACKAGES = {"PIL": "Pillow", "matplotlib": "matplotlib", "numpy": "numpy", "rich": "rich", "sklearn": "scikit-learn"}


def add_cosine(commands: Any) -> None:
    """Figure 4."""
    parser = _add(
        commands,
        "cosine",
        "feature cosine distance of every layer (Figure 4)",
        "Mean pairwise cosine distance of the channels of each layer, averaged over images: cosine.png, .csv, .json.\n"
        "0: all channels are alike; 0.5: the greatest possible. Channels that do nothing count as different from all\n"
        "others, so their share and the distance without them are shown beside it.",
        "RUN/checkpoint-1000.pt OTHER/checkpoint-1000.pt --label 'with GRN' --label 'without' --data val",
    )
    add_networks(parser, random=True)
    add_images(parser, photos=True, images=1000)
    add_tap(parser, "grn")
    add_dead(parser)
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
    add_networks(parser, random=True)
    add_images(parser, photos=False, images=None)
    add_tap(parser, "block")
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
    add_networks(parser, random=True)
    add_images(parser, photos=True, images=None, several=False)
    parser.add_argument(
        "--image", default="0", metavar="NAME|N", help="which image: its name, or its place from 0 (default: 0)"
    )
    parser.add_argument(
        "--layer", nargs="+", metavar="stages.S.B", help="blocks to show (default: the last block of the third stage)"
    )
    add_tap(parser, "grn")
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
    add_dead(parser)
    parser.add_argument(
        "--saturated",
        type=share,
        default=0.05,
        metavar="X",
        help="a map is saturated if its deviation is at most this share of its mean (default: %(default)s)",
    )
    parser.set_defaults(run=_run("run_activations", "pictures"))


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
    add_networks(parser, random=False)
    add_images(parser, photos=True, images=8)
    parser.add_argument(
        "--mask-ratio", type=share, metavar="R", help="hidden share of the patches (default: that of the training)"
    )
    parser.set_defaults(run=_run("run_reconstruct", "pictures"))


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
    add_networks(parser, random=True)
    add_labelled(parser)
    parser.add_argument("--k", type=positive_int, default=20, metavar="N", help="neighbours (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=positive_float,
        default=0.07,
        metavar="T",
        help="a neighbour of similarity s weighs exp(s / T) (default: %(default)s)",
    )
    parser.set_defaults(run=_run("run_knn", "probing"))


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
    add_networks(parser, random=True)
    add_labelled(parser)
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
    parser.set_defaults(run=_run("run_probe", "probing"))


COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_cosine,
    add_selectivity,
    add_activations,
    add_reconstruct,
    add_knn,
    add_probe,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all analyses."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Analyse what networks have learned, as the ConvNeXt V2 paper does.",
        epilog="More on an analysis: ANALYSIS --help. Definitions: docs/analysis.md.",
    )
    commands = parser.add_subparsers(dest="command", metavar="ANALYSIS", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run an analysis; return the exit code of the process."""
    args = build_parser().parse_args(argv)
    try:
        from ..train.errors import TrainingError

        try:
            return args.run(args)
        except (TrainingError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"error: analyze {args.command} needs {package}: pip install {package}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(name: str, module: str = "commands") -> Callable[[argparse.Namespace], int]:
    """The function ``name`` of a module of the analyses, which is imported when it is called."""

    def run(args: argparse.Namespace) -> int:
        return getattr(import_module(f"convnextv2_kernels.analysis.{module}"), name)(args)

    return run


def _add(commands: Any, name: str, short: str, text: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help=short,
        description=text,
        epilog=f"example:\n  {PROG} {name} {example}",
    )
