"""The command line: ``info``, ``bench``, ``tune``, ``pretrain``, ``finetune``, ``analyze`` and ``convert``.

Only argparse and the standard library are imported here; a subcommand imports what it needs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import finetune, pretrain
from .types import image_size, positive_int, share

PROG = "python -m convnextv2_kernels"
CHECKPOINT_FORMATS = ("official", "official-sparse", "fcmae", "timm", "transformers", "mmpretrain")

# Modules a run imports that plain use of the kernels does not need, and what installs them.
TRAIN_PACKAGES = {"PIL": "Pillow", "numpy": "numpy", "rich": "rich", "safetensors": "safetensors"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Exact sparse FCMAE pre-training of ConvNeXt V2: show what this installation "
        "can do, measure it, train, look into what was trained, and convert checkpoints.",
        epilog=f"New here? Try '{PROG} pretrain --demo'. More on a command: COMMAND --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "info",
        help="show versions, the machine and which kernels serve it",
        description="Show versions, the machine, and which backend serves each operation.",
    )
    commands.add_parser("bench", add_help=False, help="measure speed and memory against masked dense PyTorch")
    _add_tune(commands)
    pretrain.add_parser(commands, PROG)
    finetune.add_parser(commands, PROG)
    commands.add_parser(
        "analyze",
        add_help=False,
        help="look into trained networks: feature diversity, class selectivity, activation maps, reconstructions, "
        "kNN and linear probe",
    )
    _add_convert(commands)
    return parser


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="measure on this GPU which products Triton should fuse, and keep the answer",
        description=(
            "Measure on this GPU, for the MLPs of a model, whether matrix products fused in Triton or those of the\n"
            "vendor's library are faster, and in which tiles. Later processes on this machine use the answer; without\n"
            "it a table that comes with the library decides. Takes minutes, most of them compilation."
        ),
        epilog=(
            "examples:\n"
            f"  {PROG} tune --model convnextv2_tiny --batch-size 256\n"
            f"  {PROG} tune --model convnextv2_base --batch-size 64 --dense"
        ),
    )
    parser.add_argument(
        "--model", nargs="+", default=["convnextv2_tiny"], metavar="NAME", help="models (default: convnextv2_tiny)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="B", help="images (default: 64)")
    parser.add_argument(
        "--img-size",
        type=image_size,
        default=(224, 224),
        metavar="S|HxW",
        help="pixels, multiples of 32 (default: 224)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--mask-ratio", type=share, default=0.6, metavar="R", help="hidden share in pre-training (default: 0.6)"
    )
    kind.add_argument("--dense", action="store_true", help="training on whole images instead")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the products (default: bfloat16)",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure, but keep nothing")


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="write a checkpoint under the names of another code base",
        description=(
            "Write a ConvNeXt V2 checkpoint under the names, and in the shapes, of another code base.\n"
            "No value changes. The format of SOURCE is recognised by its keys; no code from the file is run."
        ),
        epilog=(
            "examples:\n"
            f"  {PROG} convert convnextv2_atto_1k_224_ema.pt atto.safetensors --to timm\n"
            f"  {PROG} convert run1/encoder.safetensors encoder.pt --to official"
        ),
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a file of torch.save or safetensors, or a folder with model.safetensors or pytorch_model.bin",
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="file to write: .safetensors, .pt, .pth or .bin")
    parser.add_argument("--to", required=True, choices=CHECKPOINT_FORMATS, help="whose names to write")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")
    parser.add_argument("--force", action="store_true", help="overwrite TARGET if it exists")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:  # It has a parser of its own, help included.
        from . import bench

        return bench.main(argv[1:])
    if argv[:1] == ["analyze"]:
        from .analyze import main as analyze_main

        return analyze_main(argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "info":
        from .. import _info

        print(_info())
        return 0
    if args.command == "tune":
        return _tune(args)
    if args.command == "convert":
        from ..checkpoints.convert import convert_file

        try:
            print(convert_file(args.source, args.target, args.to, use_ema=args.ema, overwrite=args.force))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    return _train(parser, args, [*PROG.split(), *argv])


def _train(parser: argparse.ArgumentParser, args: argparse.Namespace, command: list[str]) -> int:
    """Run ``pretrain`` or ``finetune``. Under torchrun only the first process says what went wrong."""
    arguments = pretrain if args.command == "pretrain" else finetune
    values = arguments.resolve(parser, args)
    silent = int(os.environ.get("RANK", "0")) > 0
    try:
        from ..train.errors import TrainingError

        try:
            return _runner(args)(values, tuple(command))
        except TrainingError as error:
            if not silent:
                print(f"error: {error}", file=sys.stderr)
            return 1
    except ModuleNotFoundError as error:
        package = TRAIN_PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"error: {args.command} needs {package}: pip install {package}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _runner(args: argparse.Namespace) -> Any:
    if args.command == "finetune":
        from ..train.finetune import run_finetune
        from ..train.options import FinetuneOptions

        return lambda values, command: run_finetune(FinetuneOptions(**values, command=command))
    from ..train.options import PretrainOptions

    if args.demo:
        from ..train.demo import run_demo as run
    else:
        from ..train.pretrain import run_folder as run
    return lambda values, command: run(PretrainOptions(**values, command=command))


def _tune(args: argparse.Namespace) -> int:
    import torch

    from . import tune

    try:
        reason = tune.unavailable()
        if reason is not None:
            raise RuntimeError(reason)
        ratio = None if args.dense else args.mask_ratio
        shapes = tune.mlp_shapes(args.model, args.img_size, ratio, getattr(torch, args.dtype))
        tune.tune(shapes, args.batch_size, keep=not args.dry_run)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
