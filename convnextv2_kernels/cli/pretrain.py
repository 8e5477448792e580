"""``pretrain``: its options, and the settings they resolve to."""

import argparse
from functools import partial
from typing import Any

from ..models.decoders import DECODERS
from ..models.fcmae import ENCODINGS
from ..train import recipes
from .exit_codes import printing_is_optional, require_packages
from .training import (
    add_images,
    add_init,
    add_machine,
    add_model,
    add_schedule,
    add_storage,
    flag_of,
    given_options,
    output_of,
    places,
    require_init,
    require_warmup,
)
from .types import file_path, positive_int, probability, share

OUTPUT = "pretrain_output"
DEMO_OUTPUT = "demo_output"
# Chosen for a few minutes on two cores; the loss is on plain pixels, so that the picture shows
# predicted colours and not the hidden patches' own.
DEMO_VALUES: dict[str, Any] = {"norm_pix_loss": False, "epochs": 1, "batch_size": 8, "lr": 2e-3, "warmup_epochs": 0.05}
DEMO_PLACES: dict[str, Any] = {"max_steps": 1400, "workers": 0}
DEMO_OPTIONS = {"output", "seed", "batch_size", "lr", "max_steps", "workers", "loader_timeout", "backend", "device"}
DEMO_OPTIONS |= {"precision", "grn"}
# Options that a recipe does not hold and that only pre-training has.
OWN: dict[str, Any] = {"encoding": "sparse", "decoder": "convnext", "init": None, "use_ema": False}
PACKAGES = ("numpy", "PIL", "rich")
DEMO_PACKAGES = ("matplotlib",)


def add_parser(commands: Any, prog: str) -> argparse.ArgumentParser:
    """Add the subcommand; return its parser."""
    recipe = recipes.PRETRAIN["default"].values
    parser = commands.add_parser(
        "pretrain",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--demo | --data FOLDER) [options]",
        help="pre-train an encoder on a folder of images, or see a short demo",
        description=(
            "Pre-train a ConvNeXt V2 or V1 encoder as a fully convolutional masked autoencoder (FCMAE):\n"
            "60 % of each image is hidden in 32x32-pixel patches, and the network learns to fill\n"
            "them in. The encoder computes nothing for the hidden patches."
        ),
        epilog=(
            "examples:\n"
            f"  {prog} pretrain --demo\n"
            f"  {prog} pretrain --data photos --epochs 100 --batch-size 64 --output run1\n"
            "  torchrun --nproc-per-node 8 -m convnextv2_kernels pretrain --data photos --recipe paper --amp\n\n"
            "A run writes checkpoints, log.jsonl, config.json and at the end encoder.safetensors\n"
            "to --output. Re-run the same command to resume after an interruption: the losses are\n"
            "exactly those of an uninterrupted run. The number of processes may change. A finished run\n"
            "is trained on, under a new schedule, with --init OUTPUT/checkpoint-N.pt and another --output."
        ),
    )
    what = parser.add_argument_group("what to train on (one of the two)")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--demo",
        action="store_true",
        help="train for a few minutes on photographs that come with scikit-image and scikit-learn, "
        "then draw reconstructions and compare with masked dense PyTorch; of the options below "
        "it takes --output, --seed, --batch-size, --lr, --max-steps, --workers, --loader-timeout, --backend, "
        f"--device, --amp and --grn (its defaults: batch size {DEMO_VALUES['batch_size']}, learning rate "
        f"{DEMO_VALUES['lr']}, {DEMO_PLACES['max_steps']} steps, output {DEMO_OUTPUT})",
    )
    source.add_argument(
        "--data",
        type=file_path,
        metavar="FOLDER",
        help="folder of images, with its subfolders; unreadable files are skipped and listed",
    )
    add_init(
        parser,
        "weights to start from: a checkpoint of this program, whose decoder is taken too, an encoder.safetensors, or a "
        "file of the official code, timm, transformers, mmpretrain or torchvision (default: random weights)",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        metavar="DIR",
        help=f"folder for all results (default: {OUTPUT}; demo: {DEMO_OUTPUT})",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"where values that are not given come from: {', '.join(recipes.PRETRAIN)} (default: default)",
    )
    _add_fcmae(add_model(parser), recipe)
    add_schedule(parser.add_argument_group("training (defaults of the recipe 'default')"), recipe)
    add_images(parser)
    add_machine(parser)
    add_storage(parser)
    parser.set_defaults(run=partial(run, parser))
    return parser


def _add_fcmae(group: argparse._ArgumentGroup, recipe: Any) -> None:
    group.add_argument(
        "--mask-ratio",
        type=share,
        metavar="R",
        help=f"share of the patches that are hidden (default: {recipe['mask_ratio']})",
    )
    group.add_argument(
        "--norm-pix-loss",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="predict each patch with its own mean and deviation removed (default: yes; demo: no, "
        "so that its picture shows predicted colours)",
    )
    group.add_argument(
        "--decoder-depth",
        type=positive_int,
        metavar="N",
        help=f"blocks of the decoder, of a UNet on each level (default: {recipe['decoder_depth']})",
    )
    group.add_argument(
        "--decoder-width",
        type=positive_int,
        dest="decoder_embed_dim",
        metavar="D",
        help=f"channels of the decoder (default: {recipe['decoder_embed_dim']})",
    )
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        help="for ablations (paper Table 1a): ConvNeXt blocks; a UNet over the encoder's stages, with skips from them "
        "or without; or MAE's transformer, which the paper compares at --decoder-depth 8 (default: convnext)",
    )
    group.add_argument(
        "--encoding",
        choices=ENCODINGS,
        help="compute the visible patches alone; or whole maps multiplied by the mask in plain PyTorch: the same "
        "numbers, for comparison; or whole maps of images that are masked once, which leak into hidden patches (the "
        "paper's 'w/o sparse conv') (default: sparse)",
    )
    group.add_argument(
        "--grn-scope",
        choices=("image", "batch"),
        help="GRN's norm over the visible pixels of an image (paper) or of a process's whole batch (official "
        f"code) (default: {recipe['grn_scope']})",
    )
    group.add_argument(
        "--hflip",
        type=probability,
        metavar="P",
        help=f"share of the crops that are mirrored (default: {recipe['hflip']})",
    )
    group.add_argument(
        "--decay",
        choices=("standard", "official"),
        help="official: weight decay takes GRN and the mask token too, as the official pre-training does "
        f"(default: {recipe['decay']})",
    )


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Train; return the exit code."""
    values = resolve(parser, args)
    require_packages("pretrain --demo" if args.demo else "pretrain", PACKAGES + (DEMO_PACKAGES if args.demo else ()))
    from ..train.config import PretrainOptions

    printing_is_optional()
    if args.demo:
        from ..train.demo import run_demo as train
    else:
        from ..train.pretrain import run_folder as train
    return train(PretrainOptions(**values, command=args.words))


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of :class:`.train.config.PretrainOptions`; ends with a usage error where options clash."""
    given = given_options(args)
    if args.demo:
        refused = sorted(set(given) - DEMO_OPTIONS)
        refused += ["recipe"] if args.recipe is not None else []
        if refused:
            flags = ", ".join(flag_of(parser, name) for name in refused)
            parser.error(f"pretrain --demo has its own settings; it does not take {flags}")
        where = {**places(given), **{k: v for k, v in DEMO_PLACES.items() if k not in given}}
        given = {**DEMO_VALUES, **given}
    else:
        where = places(given)
        require_init(parser, given)
    try:
        resolved = recipes.resolve(recipes.PRETRAIN, "default" if args.recipe is None else args.recipe, given)
    except ValueError as error:
        parser.error(str(error))
    require_warmup(parser, resolved)
    where["output"] = output_of(given, DEMO_OUTPUT if args.demo else OUTPUT)
    where["img_size"] = resolved.values["img_size"]
    own = {name: given.get(name, value) for name, value in OWN.items()}
    return {**where, **own, "resolved": resolved}
