"""Conversion between the formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .._console import visible
from .formats import V1, WRITABLE, block_kind, layer_names, other_decoder, written_as
from .shapes import from_canonical
from .state import State, listing, read_checkpoint, require_consistent, shown, unwrap
from .storage import SUFFIXES, read_checkpoint_file, write_file

_KEEPS_GRN = ("official", "fcmae")  # formats of this library, whose networks have variants of GRN

# Stem widths of atto, femto, pico and nano, of V2 and of V1, the sizes that timm builds with 1x1 convolutions.
_CONV_MLP_WIDTHS = (40, 48, 64, 80)


class Conversion(NamedTuple):
    """A converted state_dict, its source format and the prefix taken off its names, the source keys that the target
    format lacks, and settings of the training that the names do not tell."""

    source_format: str
    prefix: str
    state_dict: dict[str, Tensor]
    left_out: list[str]
    settings: dict[str, str]


def convert_state_dict(sd: Mapping[str, Any], to: str, *, conv_mlp: bool | None = None) -> dict[str, Tensor]:
    """ConvNeXt V2 or V1 parameters under the names and in the shapes of another code base.

    Args:
        sd: state_dict of any format below, or of a part of such a model: timm's ``features_only``, transformers' base
            model and backbone, mmpretrain's backbone, the official encoder-only FCMAE files. May be wrapped as
            ``model``, ``state_dict`` or the like; ``module.`` and ``_orig_mod.`` are removed from the keys, as is a
            prefix such as ``model.`` that all keys of the network have.
        to: ``"official"`` (dense code, ``models/convnextv2.py``), ``"official-sparse"`` (``models/fcmae.py``, on
            MinkowskiEngine), ``"fcmae"`` (this library's FCMAE: the same with the dense names in the encoder),
            ``"timm"``, ``"transformers"``, ``"mmpretrain"`` or, for V1 alone, ``"torchvision"``; V1 has no
            ``"official-sparse"``.
        conv_mlp: timm's pointwise layers as 1x1 convolutions ``(out, in, 1, 1)`` or linear maps ``(out, in)``. By
            default as in ``sd`` if that is timm's, else as timm builds it: convolutions for atto, femto, pico, nano.

    Returns:
        Contiguous tensors of the same values and dtypes, which may share memory with ``sd``. Parameters that the format
        lacks are dropped: the decoder, ``proj``, ``pred`` and the mask token, except in ``"official-sparse"`` and
        ``"fcmae"``, which have no final norm and no head.

    Raises:
        TypeError: ``sd`` is not a mapping.
        ValueError: unknown ``to``; ``conv_mlp`` for a format other than timm's; ``sd`` has keys or shapes that no
            ConvNeXt has, is of a version that the format has no names for, has shapes that contradict each other,
            lacks parameters, or contains anything but dense floating-point tensors; it records a GRN, or has a layer
            in its place or a decoder, that only this library has, and ``to`` is another's format.
    """
    if not isinstance(sd, Mapping):
        raise TypeError(f"sd must be a state_dict, got {type(sd).__name__}")
    config = sd.get("config")
    settings = config if isinstance(config, Mapping) else {}
    return convert(read_checkpoint(unwrap(sd, False, "sd"), "sd"), to, conv_mlp, settings).state_dict


def convert(
    state: State, to: str, conv_mlp: bool | None = None, settings: Mapping[str, Any] | None = None
) -> Conversion:
    """See :func:`convert_state_dict`; ``settings`` as :class:`.storage.CheckpointFile` has them."""
    if to not in WRITABLE:
        raise ValueError(f"to must be one of {', '.join(WRITABLE)}, got {to!r}")
    require_consistent(state)
    block = block_kind(state.tensors)
    if (target := written_as(to, state.tensors)) is None:
        raise ValueError(f"{state.what} is {block}, which {to} does not have")
    kept = _grn_settings(settings or {})
    if to not in _KEEPS_GRN and (block, kept.get("grn")) == (V1, "none"):
        del kept["grn"]  # its names say so
    if kept.get("grn") and to not in _KEEPS_GRN:
        raise ValueError(f"{state.what} was trained with the GRN {shown(kept['grn'])!r}, which {to} does not have")
    if layer_names(state.tensors) and to not in _KEEPS_GRN:
        raise ValueError(f"{state.what} has another layer in the place of GRN, which {to} does not have")
    if to == "official-sparse" and (name := other_decoder(state.tensors)) is not None:
        raise ValueError(f"{state.what} has a decoder with {shown(state.keys[name])}, which {to} does not have")
    if conv_mlp is None:
        conv_mlp = _conv_mlp(state)
    elif to != "timm":
        raise ValueError(f"conv_mlp is for to='timm' only, got conv_mlp={conv_mlp} with to={to!r}")
    own = target.own
    converted = {
        key: from_canonical(name, tensor, to, conv_mlp)
        for name, tensor in state.tensors.items()
        if (key := own(name)) is not None
    }
    left_out = [key for name, key in state.keys.items() if own(name) is None] + list(state.outside)
    return Conversion(state.format.name, state.prefix, converted, left_out, kept)


def convert_file(source: Path, target: Path, to: str, *, use_ema: bool = False, overwrite: bool = False) -> str:
    """Convert a file into another; returns a summary.

    Raises:
        OSError: no such file, or the target exists already or cannot be written.
        ValueError: as :func:`convert_state_dict`, or a file that cannot be read, see
            :func:`.storage.read_checkpoint_file`.
    """
    name, what = visible(str(target)), visible(str(source))
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{name} must end in {', '.join(SUFFIXES)}, which tells the kind of file to write")
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise FileExistsError(f"{name} exists already; --force overwrites it")
    file = read_checkpoint_file(source)
    done = convert(read_checkpoint(unwrap(file.content, use_ema, what), what), to, settings=file.settings)
    write_file(target, done.state_dict, to, done.settings)
    behind = f" behind {shown(done.prefix)}" if done.prefix else ""
    return (
        f"{what}: {done.source_format} names{behind}\n"
        f"{name}: {to} names, {len(done.state_dict)} tensors\n"
        f"left out: {listing(done.left_out) or 'nothing'}"
    )


def _grn_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """What differs from the GRN of the paper."""
    usual = {"grn": "default", "grn_scope": "image"}
    return {
        name: value
        for name, default in usual.items()
        if isinstance(value := settings.get(name), str) and value != default
    }


def _conv_mlp(state: State) -> bool:
    if state.format.name.startswith("timm"):
        return state.original[state.keys["stages.0.0.pwconv1.weight"]].dim() == 4
    return state.tensors["downsample_layers.0.0.weight"].shape[0] in _CONV_MLP_WIDTHS
