"""``finetune``: its options, and the settings they resolve to."""

import argparse
from functools import partial
from typing import Any

from ..train import recipes
from .exit_codes import printing_is_optional, require_packages
from .training import (
    add_images,
    add_init,
    add_machine,
    add_model,
    add_schedule,
    add_storage,
    given_options,
    output_of,
    places,
    require_init,
    require_warmup,
)
from .types import file_path, nonnegative_float, positive_float, positive_int, probability, share

OUTPUT = "finetune_output"
# Options that a recipe does not hold and that only fine-tuning has.
OWN: dict[str, Any] = {
    "val": None,
    "val_share": 0.1,
    "init": None,
    "use_ema": False,
    "crop_pct": None,
    "eval_only": False,
    "eval_every": 1,
    "init_grn": None,
}
PACKAGES = ("numpy", "PIL", "rich")


def add_parser(commands: Any, prog: str) -> argparse.ArgumentParser:
    """Add the subcommand; return its parser."""
    recipe = recipes.FINETUNE["convnextv2_atto"].values
    parser = commands.add_parser(
        "finetune",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --data FOLDER [--init WEIGHTS] [options]",
        help="train a classifier on a folder of classes, from pre-trained weights",
        description=(
            "Train a ConvNeXt V2 or V1 classifier. FOLDER holds one subfolder of images for each class, or train/ and\n"
            "val/ with such subfolders. Needs timm for augmentation; the extra [train] of this package brings it."
        ),
        epilog=(
            "examples:\n"
            f"  {prog} finetune --data flowers --init run1/encoder.safetensors --output flowers1\n"
            f"  {prog} finetune --data imagenet --model convnextv2_base --init convnextv2_base_1k_224_fcmae.pt --amp\n"
            f"  {prog} finetune --data flowers --init flowers1/best.safetensors --eval-only\n\n"
            "A run writes checkpoints, log.jsonl, metrics.jsonl, config.json, classes.json, best.safetensors and at\n"
            "the end model.safetensors to --output. Re-run the same command to resume after an interruption."
        ),
    )
    _add_data(parser)
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="where values that are not given come from; the one called like --model by default. 'info --recipes' "
        "lists all of them",
    )
    _add_regularization(add_model(parser), recipe)
    add_schedule(parser.add_argument_group("training (defaults of the recipe 'convnextv2_atto')"), recipe)
    _add_augmentation(parser, recipe)
    add_images(parser)
    add_machine(parser)
    add_storage(parser)
    parser.set_defaults(run=partial(run, parser))
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=file_path, required=True, metavar="FOLDER", help="folder of classes, see above")
    parser.add_argument(
        "--val",
        type=file_path,
        metavar="FOLDER",
        help="folder of classes to evaluate on (default: FOLDER/val, or a share of each class)",
    )
    parser.add_argument(
        "--val-share",
        type=share,
        metavar="R",
        help=f"share of each class to evaluate on where there is no such folder (default: {OWN['val_share']})",
    )
    add_init(
        parser,
        "weights to start from: encoder.safetensors or a checkpoint of this program, or a file of the official code, "
        "timm, transformers, mmpretrain or torchvision; its head is left out (default: random weights)",
    )
    parser.add_argument(
        "--init-grn",
        choices=("drop", "add"),
        help="GRN in one of pre-training and fine-tuning alone (paper Table 2f): drop takes the weights of --init "
        "without their GRN, with --grn none; add gives weights without GRN a new one, that of --grn (default: the "
        "weights must have the GRN of --grn)",
    )
    parser.add_argument("--output", type=file_path, metavar="DIR", help=f"folder for all results (default: {OUTPUT})")
    parser.add_argument(
        "--eval-only", action="store_const", const=True, help="evaluate --init, head included, and train nothing"
    )
    parser.add_argument("--eval-every", type=positive_int, metavar="N", help="epochs between evaluations (default: 1)")


def _add_regularization(group: argparse._ArgumentGroup, recipe: Any) -> None:
    group.add_argument(
        "--drop-path",
        type=probability,
        metavar="P",
        help=f"drop path of the last block (default: {recipe['drop_path']})",
    )
    group.add_argument(
        "--head-init-scale",
        type=positive_float,
        metavar="X",
        help=f"factor on the first weights of the head (default: {recipe['head_init_scale']})",
    )
    group.add_argument(
        "--layer-decay",
        type=positive_float,
        metavar="X",
        help=f"factor of the learning rate from a layer to the one below (default: {recipe['layer_decay']})",
    )
    group.add_argument(
        "--layer-decay-kind",
        choices=("single", "group"),
        help="what counts as a layer: a block, or the official 12 groups for base and large",
    )


def _add_augmentation(parser: argparse.ArgumentParser, recipe: Any) -> None:
    group = parser.add_argument_group("augmentation (by timm) and loss")
    group.add_argument("--aa", metavar="POLICY", help=f"timm's name of a policy, or 'none' (default: {recipe['aa']})")
    group.add_argument(
        "--color-jitter", type=nonnegative_float, metavar="X", help="instead of a policy (default: none)"
    )
    group.add_argument(
        "--crop-scale", type=share, metavar="R", help=f"smallest share of a crop (default: {recipe['crop_scale']})"
    )
    group.add_argument(
        "--hflip",
        type=probability,
        metavar="P",
        help=f"share of images that are mirrored; 0 for digits and text (default: {recipe['hflip']})",
    )
    group.add_argument(
        "--reprob", type=probability, metavar="P", help=f"share with an erased box (default: {recipe['reprob']})"
    )
    group.add_argument(
        "--mixup", type=nonnegative_float, metavar="A", help=f"alpha of Mixup (default: {recipe['mixup']})"
    )
    group.add_argument(
        "--cutmix", type=nonnegative_float, metavar="A", help=f"alpha of CutMix (default: {recipe['cutmix']})"
    )
    group.add_argument(
        "--mix-prob", type=probability, metavar="P", help=f"share of mixed batches (default: {recipe['mix_prob']})"
    )
    group.add_argument(
        "--switch-prob",
        type=probability,
        metavar="P",
        help=f"share of CutMix where both are on (default: {recipe['switch_prob']})",
    )
    group.add_argument(
        "--smoothing", type=probability, metavar="X", help=f"label smoothing (default: {recipe['smoothing']})"
    )
    group.add_argument(
        "--crop-pct",
        type=positive_float,
        metavar="R",
        help="evaluation: side of the crop as a share of the resized image (default: 224/256 below 384 px)",
    )


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Train, or evaluate; return the exit code."""
    values = resolve(parser, args)
    require_packages("finetune", PACKAGES)
    from ..train.config import FinetuneOptions
    from ..train.finetune import run_finetune

    printing_is_optional()
    return run_finetune(FinetuneOptions(**values, command=args.words))


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of :class:`.train.config.FinetuneOptions`; ends with a usage error where options clash."""
    given = given_options(args)
    where = places(given)
    own_name = where["model"] if where["model"] in recipes.FINETUNE else "default"
    name = own_name if args.recipe is None else args.recipe
    if given.get("aa") == "none":
        given["aa"] = ""
    try:
        resolved = recipes.resolve(recipes.FINETUNE, name, given)
    except ValueError as error:
        parser.error(str(error))
    if resolved.values["epochs"]:
        require_warmup(parser, resolved)
    values = resolved.values
    if values["color_jitter"] and values["aa"]:
        parser.error(
            f"--color-jitter {values['color_jitter']:g} has no effect beside --aa {values['aa']}; add --aa none"
        )
    if args.eval_only and args.init is None:
        parser.error("--eval-only evaluates the weights of --init, which is missing")
    require_init(parser, given)
    _require_init_grn(parser, args, where["grn"])
    where["output"], where["img_size"] = output_of(given, OUTPUT), values["img_size"]
    own = {key: given.get(key, value) for key, value in OWN.items()}
    return {**where, **own, "resolved": resolved}


def _require_init_grn(parser: argparse.ArgumentParser, args: argparse.Namespace, grn: str) -> None:
    if args.init_grn is None:
        return
    if args.init is None:
        parser.error(f"--init-grn {args.init_grn} is about the weights of --init, which is missing")
    if args.eval_only:
        parser.error(f"--init-grn {args.init_grn} is for fine-tuning; --eval-only evaluates weights as they are")
    if (args.init_grn == "drop") != (grn.strip() == "none"):
        wanted = "needs --grn none" if args.init_grn == "drop" else "needs a --grn to add"
        parser.error(f"--init-grn {args.init_grn} {wanted}, got --grn {grn}")
