"""The command line: ``info``, ``bench``, ``tune``, ``pretrain`` and ``convert``.

Only argparse and the standard library are imported here; a subcommand imports what it needs.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROG = "python -m convnextv2_kernels"
BACKEND_VARIABLE = "CONVNEXTV2_KERNELS_BACKEND"
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
CHECKPOINT_FORMATS = ("official", "official-sparse", "fcmae", "timm", "transformers", "mmpretrain")

# Modules a run imports that plain use of the kernels does not need, and what installs them.
TRAIN_PACKAGES = {
    "PIL": "Pillow",
    "numpy": "numpy",
    "rich": "rich",
    "safetensors": "safetensors",
}

DATA_DEFAULTS: dict[str, Any] = {
    "data": None,
    "output": Path("pretrain_output"),
    "model": "convnextv2_atto",
    "img_size": (224, 224),
    "mask_ratio": 0.6,
    "norm_pix_loss": True,
    "epochs": 800,
    "batch_size": 64,
    "blr": 1.5e-4,
    "lr": None,
    "weight_decay": 0.05,
    "max_steps": None,
    "workers": min(4, os.cpu_count() or 1),
    "save_every": 0,
    "keep": 3,
}
WARMUP_SHARE = 0.05  # of the epochs, the official 40 of 800
# Chosen for a few minutes on two cores; the loss is on plain pixels, so that the picture shows
# predicted colours and not the hidden patches' own.
DEMO_DEFAULTS: dict[str, Any] = {
    "output": Path("demo_output"),
    "norm_pix_loss": False,
    "epochs": 1,
    "batch_size": 8,
    "lr": 2e-3,
    "warmup_epochs": WARMUP_SHARE,
    "max_steps": 1400,
    "workers": 0,
}
DEMO_OPTIONS = {
    "output", "seed", "batch_size", "lr", "max_steps", "workers", "backend", "device", "amp",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Exact sparse FCMAE pre-training of ConvNeXt V2: show what this installation "
        "can do, measure it, train, and convert checkpoints.",
        epilog=f"New here? Try '{PROG} pretrain --demo'. More on a command: COMMAND --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "info",
        help="show versions, the machine and which kernels serve it",
        description="Show versions, the machine, and which backend serves each operation.",
    )
    commands.add_parser(
        "bench",
        add_help=False,
        help="measure speed and memory against masked dense PyTorch",
    )
    _add_tune(commands)
    _add_pretrain(commands)
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
    parser.add_argument("--batch-size", type=_positive_int, default=64, metavar="B", help="images (default: 64)")
    parser.add_argument(
        "--img-size", type=_image_size, default=(224, 224), metavar="S|HxW", help="pixels, multiples of 32 "
        "(default: 224)",
    )  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--mask-ratio", type=_share, default=0.6, metavar="R", help="hidden share in pre-training (default: 0.6)"
    )
    kind.add_argument("--dense", action="store_true", help="training on whole images instead")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the products "
        "(default: bfloat16)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="measure, but keep nothing")


def _add_pretrain(commands: Any) -> None:
    data, demo = DATA_DEFAULTS, DEMO_DEFAULTS
    parser = commands.add_parser(
        "pretrain",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--demo | --data FOLDER) [options]",
        help="pre-train an encoder on a folder of images, or see a short demo",
        description=(
            "Pre-train a ConvNeXt V2 encoder as a fully convolutional masked autoencoder (FCMAE):\n"
            "60 % of each image is hidden in 32x32-pixel patches, and the network learns to fill\n"
            "them in. The encoder computes nothing for the hidden patches."
        ),
        epilog=(
            "examples:\n"
            f"  {PROG} pretrain --demo\n"
            f"  {PROG} pretrain --data photos --epochs 100 --batch-size 64 --output run1\n\n"
            "A run writes checkpoints, log.jsonl, config.json and at the end encoder.safetensors\n"
            "to --output. Run the same command again to go on after an interruption: the losses\n"
            "are exactly those of a run that was never interrupted."
        ),
    )
    what = parser.add_argument_group("what to train on (one of the two)")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--demo",
        action="store_true",
        help="train for a few minutes on photographs that come with scikit-image and scikit-learn, "
        "then draw reconstructions and compare with masked dense PyTorch; of the options below "
        "it takes --output, --seed, --batch-size, --lr, --max-steps, --workers, --backend, "
        "--device and --amp",
    )
    source.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder of images, with its subfolders; unreadable files are skipped and listed",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for all results (default: {data['output']}; demo: {demo['output']})",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        help="convnextv2_ followed by atto, femto, pico, nano, tiny, base, large or huge "
        f"(default: {data['model']})",
    )
    model.add_argument(
        "--img-size",
        type=_image_size,
        metavar="S|HxW",
        help="side, or height x width, of the crops in pixels; multiples of 32 (default: 224)",
    )
    model.add_argument(
        "--mask-ratio",
        type=_share,
        metavar="R",
        help=f"share of the patches that is hidden (default: {data['mask_ratio']})",
    )
    model.add_argument(
        "--norm-pix-loss",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="predict each patch with its own mean and deviation removed (default: yes; demo: no, "
        "so that its picture shows predicted colours)",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=_positive_int,
        metavar="N",
        help="passes over the images, which the learning rate schedule spans "
        f"(default: {data['epochs']})",
    )
    training.add_argument(
        "--batch-size",
        type=_positive_int,
        metavar="B",
        help=f"images per step (default: {data['batch_size']}; demo: {demo['batch_size']})",
    )
    rate = training.add_mutually_exclusive_group()
    rate.add_argument(
        "--blr",
        type=_positive_float,
        metavar="X",
        help="peak learning rate at 256 images a step; the actual one is X * B / 256 "
        f"(default: {data['blr']})",
    )
    rate.add_argument(
        "--lr",
        type=_positive_float,
        metavar="X",
        help=f"peak learning rate itself, instead of --blr (demo: {demo['lr']})",
    )
    training.add_argument(
        "--weight-decay",
        type=_nonnegative_float,
        metavar="X",
        help="AdamW weight decay; biases, norms, GRN and the mask token have none "
        f"(default: {data['weight_decay']})",
    )
    training.add_argument(
        "--warmup-epochs",
        type=_nonnegative_float,
        metavar="N",
        help="epochs of linear warm-up, fractions allowed (default: 5 %% of --epochs)",
    )
    training.add_argument(
        "--max-steps",
        type=_positive_int,
        metavar="N",
        help="stop after N steps; with --data the schedule still spans --epochs, and a later run "
        f"goes on (default: none; demo: {demo['max_steps']}, which its schedule spans)",
    )
    training.add_argument(
        "--seed",
        type=_nonnegative_int,
        default=0,
        metavar="N",
        help="seed of weights, crops and masks (default: %(default)s)",
    )
    training.add_argument(
        "--amp", action="store_true", help="compute in bfloat16 where it is safe (default: float32)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get(BACKEND_VARIABLE, "auto"),
        help="kernels to use; auto takes the fastest that serves (default: the variable "
        f"{BACKEND_VARIABLE}, else auto)",
    )
    machine.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda or cuda:N; auto takes a GPU where there is one (default: %(default)s)",
    )
    machine.add_argument(
        "--workers",
        type=_nonnegative_int,
        metavar="N",
        help="processes that load images; their number changes no result "
        "(default: one per core, 4 at most; demo: 0)",
    )
    storage = parser.add_argument_group("checkpoints (with --data)")
    storage.add_argument(
        "--save-every",
        type=_positive_int,
        metavar="N",
        help="write one every N steps besides that at the end of each epoch (default: off)",
    )
    storage.add_argument(
        "--keep",
        type=_positive_int,
        metavar="N",
        help=f"how many of the last ones to keep (default: {data['keep']})",
    )


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
        from .benchmark import main as bench_main

        return bench_main(argv[1:]) or 0
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "info":
        from . import info

        print(info())
        return 0
    if args.command == "tune":
        return _tune(args)
    if args.command == "convert":
        from .checkpoints.convert import convert_file

        try:
            print(convert_file(args.source, args.target, args.to, use_ema=args.ema, overwrite=args.force))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    return _pretrain(parser, args, [*PROG.split(), *argv])


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


def _pretrain(parser: argparse.ArgumentParser, args: argparse.Namespace, command: list[str]) -> int:
    values = _resolve(parser, args)
    try:
        from .train.errors import TrainingError
        from .train.options import Options

        options = Options(**values, command=tuple(command))
        try:
            if args.demo:
                from .train.demo import run_demo as run
            else:
                from .train.pretrain import run_folder as run
            return run(options)
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    except ModuleNotFoundError as error:
        package = TRAIN_PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"error: pretrain needs {package}: pip install {package}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Fill in the defaults of the chosen kind of run; end with a usage error where they clash."""
    given = {k: v for k, v in vars(args).items() if k not in ("command", "demo") and v is not None}
    if args.demo:
        alien = sorted(set(given) - DEMO_OPTIONS)
        if alien:
            flags = ", ".join("--" + name.replace("_", "-") for name in alien)
            parser.error(f"pretrain --demo has its own settings; it does not take {flags}")
        return {**DATA_DEFAULTS, **DEMO_DEFAULTS, **given}
    values = {**DATA_DEFAULTS, **given}
    values.setdefault("warmup_epochs", WARMUP_SHARE * values["epochs"])
    if values["warmup_epochs"] >= values["epochs"]:
        parser.error(
            f"--warmup-epochs {values['warmup_epochs']:g} must be less than "
            f"--epochs {values['epochs']}"
        )
    return values


def _number(kind: type, accept: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


_positive_int = _number(int, lambda v: v > 0, "a whole number above 0")
_nonnegative_int = _number(int, lambda v: v >= 0, "a whole number, 0 or more")
_positive_float = _number(float, lambda v: 0 < v < math.inf, "a number above 0")
_nonnegative_float = _number(float, lambda v: 0 <= v < math.inf, "a number, 0 or more")
_share = _number(float, lambda v: 0 < v < 1, "a number between 0 and 1")


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected a side or HxW in pixels, got {text!r}")
    return int(sides[0]), int(sides[1])
