"""``convert``: writes a checkpoint under the names of another code base."""

import argparse
from typing import Any

from ..checkpoints.convert import convert_file
from ..checkpoints.formats import WRITABLE
from .exit_codes import OK, printing_is_optional, user_errors
from .types import file_path


def add_parser(commands: Any, prog: str) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="write a checkpoint under the names of another code base",
        description=(
            "Write a ConvNeXt V2 or V1 checkpoint under the names, and in the shapes, of another code base.\n"
            "No value changes. The format of SOURCE is recognised by its keys; no code from the file is run."
        ),
        epilog=(
            "examples:\n"
            f"  {prog} convert convnextv2_atto_1k_224_ema.pt atto.safetensors --to timm\n"
            f"  {prog} convert run1/encoder.safetensors encoder.pt --to official"
        ),
    )
    parser.add_argument(
        "source",
        type=file_path,
        metavar="SOURCE",
        help="a file of torch.save or safetensors, or a folder with model.safetensors or pytorch_model.bin",
    )
    parser.add_argument(
        "target", type=file_path, metavar="TARGET", help="file to write: .safetensors, .pt, .pth or .bin"
    )
    parser.add_argument("--to", required=True, choices=WRITABLE, help="whose names to write")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")
    parser.add_argument("--force", action="store_true", help="overwrite TARGET if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was left out."""
    printing_is_optional()
    with user_errors(OSError, ValueError):
        print(convert_file(args.source, args.target, args.to, use_ema=args.ema, overwrite=args.force))
    return OK
