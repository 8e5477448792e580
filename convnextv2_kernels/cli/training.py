"""Options that ``pretrain`` and ``finetune`` share, and the values they resolve to."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import settings
from ..data import MAX_PIXELS
from ..sizes import V1_NAMES, V2_NAMES
from ..train.recipes import Resolved
from .types import (
    BACKENDS,
    MODEL_PREFIX,
    add_decoding,
    decay,
    file_path,
    image_size,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
    seconds,
    share,
    short_name,
)

BACKEND_VARIABLE = "CONVNEXTV2_KERNELS_BACKEND"
# Options that say where a run lives and on what it runs; those a recipe holds are not among them.
PLACES: dict[str, Any] = {
    "data": None,
    "model": "convnextv2_atto",
    "grn": "default",
    "seed": 0,
    "workers": min(4, os.cpu_count() or 1),
    "loader_timeout": 300.0,
    "peer_timeout": 60.0,
    "save_every": 0,
    "keep": 3,
    "max_steps": None,
    "tensorboard": False,
    "parallel": "ddp",
    "accumulate": 1,
    "value_range": None,
    "max_pixels": MAX_PIXELS,
}


def add_init(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the options of the first weights; ``text`` is the help of ``--init``."""
    parser.add_argument("--init", type=file_path, metavar="WEIGHTS", help=text)
    parser.add_argument(
        "--ema", action="store_const", const=True, dest="use_ema", help="take the averaged weights of --init"
    )


def require_init(parser: argparse.ArgumentParser, given: Mapping[str, Any]) -> None:
    """End with a usage error where ``--ema`` has no weights to be of."""
    if given.get("use_ema") and given.get("init") is None:
        parser.error("--ema takes the averaged weights of --init, which is missing (--ema-decay keeps an average)")


def flag_of(parser: argparse.ArgumentParser, name: str) -> str:
    """The option that sets ``name``."""
    return next((a.option_strings[0] for a in parser._actions if a.dest == name and a.option_strings), f"--{name}")


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options of the network; return their group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"{MODEL_PREFIX} followed by {', '.join(map(short_name, V2_NAMES))}; or V1 (layer scale, no GRN): "
        f"{', '.join(V1_NAMES)} (default: {PLACES['model']})",
    )
    group.add_argument(
        "--img-size",
        type=image_size,
        metavar="S|HxW",
        help="side, or height x width, of the crops in pixels; multiples of 32 (default: the recipe's, mostly 224)",
    )
    group.add_argument(
        "--grn",
        metavar="WORDS",
        help="the block's GRN, for ablations (paper Tables 2 and 16): default; none; words of l2, l1, mean "
        "(aggregation), divisive, standardize, inverse (normalisation), no-skip, affine (scale and shift alone), "
        "aggregate-only, normalize-only, separated by commas; or another layer in its place: lrn, bn, ln, se, cbam "
        "(the last two are timm's). All but the first two run as plain PyTorch (default: default; V1 has none)",
    )
    return group


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how image files are decoded."""
    add_decoding(parser.add_argument_group("image files"))


def add_schedule(group: argparse._ArgumentGroup, recipe: Mapping[str, Any]) -> None:
    """Add the options of optimiser and schedule. ``recipe`` holds the default one's values."""
    group.add_argument(
        "--epochs",
        type=positive_int,
        metavar="N",
        help=f"passes over the images, which the learning rate schedule spans (default: {recipe['epochs']})",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="B",
        help=f"images per step, over all processes (default: {recipe['batch_size']})",
    )
    rate = group.add_mutually_exclusive_group()
    rate.add_argument(
        "--blr",
        type=positive_float,
        metavar="X",
        help=f"peak learning rate at 256 images a step; the actual one is X * B / 256 (default: {recipe['blr']})",
    )
    rate.add_argument("--lr", type=positive_float, metavar="X", help="peak learning rate itself, instead of --blr")
    group.add_argument(
        "--min-lr", type=nonnegative_float, metavar="X", help=f"learning rate at the end (default: {recipe['min_lr']})"
    )
    group.add_argument(
        "--weight-decay",
        type=nonnegative_float,
        metavar="X",
        help="AdamW weight decay; biases, norms, GRN and the mask token have none "
        f"unless --decay official (default: {recipe['weight_decay']})",
    )
    group.add_argument(
        "--betas", type=share, nargs=2, metavar="B", help="of AdamW (default: {:g} {:g})".format(*recipe["betas"])
    )
    group.add_argument(
        "--warmup-epochs",
        type=nonnegative_float,
        metavar="N",
        help="epochs of linear warm-up, fractions allowed (default: the recipe's, and its share of --epochs where it "
        "states none for these)",
    )
    group.add_argument(
        "--clip-grad", type=positive_float, metavar="X", help="largest norm of the gradient (default: off)"
    )
    group.add_argument(
        "--ema-decay",
        type=decay,
        metavar="X",
        help="keep a moving average of the weights with this factor, such as 0.9999, or 'off' (default: "
        f"{recipe['ema_decay'] or 'off'})",
    )
    precision = group.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float64"),
        help="bfloat16: matrix multiplications in bfloat16, the rest in float32 (default: float32)",
    )
    precision.add_argument(
        "--amp", action="store_const", dest="precision", const="bfloat16", help="the same as --precision bfloat16"
    )
    group.add_argument(
        "--max-steps",
        type=positive_int,
        metavar="N",
        help="stop after N steps; the schedule still spans --epochs, and a later run resumes (default: none)",
    )
    group.add_argument(
        "--seed",
        type=nonnegative_int,
        metavar="N",
        help=f"seed of weights, crops and all other draws (default: {PLACES['seed']})",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options of devices, processes and kernels."""
    group = parser.add_argument_group(
        "machine (changes results by rounding alone, unless images are mixed or share one GRN norm)"
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="kernels to use; auto takes the fastest that can run (default: the variable "
        f"{BACKEND_VARIABLE}, else auto)",
    )
    group.add_argument(
        "--device",
        help="cpu, cuda or cuda:N; auto takes a GPU where there is one, under torchrun the one of each process "
        "(default: auto)",
    )
    group.add_argument(
        "--workers",
        type=nonnegative_int,
        metavar="N",
        help="processes that load images, for each process that trains (default: one per core, 4 at most)",
    )
    group.add_argument(
        "--loader-timeout",
        type=seconds,
        metavar="S",
        help="end the run, with a checkpoint, where a batch is waited for and no image was begun for S seconds, as on "
        f"a network file system that hangs (default: {PLACES['loader_timeout']:g})",
    )
    group.add_argument(
        "--peer-timeout",
        type=seconds,
        metavar="S",
        help="with torchrun: end the run where a process gives no sign of life for S seconds, or lets others wait for "
        f"its numbers 10 times as long (default: {PLACES['peer_timeout']:g})",
    )
    group.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="with torchrun: copies of the model (ddp), or shards of it, for models that do not fit (fsdp) "
        f"(default: {PLACES['parallel']})",
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        metavar="N",
        help="compute a step's images in N parts, one after the other, to save memory (default: 1)",
    )


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Add the options of checkpoints and logs."""
    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument(
        "--save-every",
        type=positive_int,
        metavar="N",
        help="write a checkpoint every N steps besides the one at the end of each epoch (default: off)",
    )
    group.add_argument(
        "--keep",
        type=positive_int,
        metavar="N",
        help=f"how many checkpoints to keep, the latest (default: {PLACES['keep']})",
    )
    group.add_argument(
        "--tensorboard",
        action="store_const",
        const=True,
        help="write scalars for TensorBoard to OUTPUT/tensorboard, beside log.jsonl",
    )


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options on the command line, by name, without the choice of command, demo and recipe."""
    others = ("command", "words", "run", "demo", "recipe")
    return {name: value for name, value in vars(args).items() if name not in others and value is not None}


def require_warmup(parser: argparse.ArgumentParser, resolved: Resolved) -> None:
    """End with a usage error where the warm-up is as long as the run."""
    values = resolved.values
    if values["warmup_epochs"] >= values["epochs"]:
        parser.error(f"--warmup-epochs {values['warmup_epochs']:g} must be less than --epochs {values['epochs']}")


def places(given: dict[str, Any]) -> dict[str, Any]:
    """The values of :data:`PLACES`, backend and device, as given or by default."""
    defaults = {**PLACES, "backend": settings.current.backend, "device": "auto"}
    found = {name: given.get(name) if given.get(name) is not None else value for name, value in defaults.items()}
    if given.get("grn") is None and found["model"] in V1_NAMES:
        found["grn"] = "none"
    return found


def output_of(given: dict[str, Any], default: str) -> Path:
    """The output folder as given or by default."""
    return given.get("output") or Path(default)
