"""Loading a checkpoint of any format into a model of any code base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._console import visible
from ..sizes import size_of
from .formats import block_kind, part_of
from .state import State, architecture, is_v1, listing, read_checkpoint, read_state, shown, unwrap
from .storage import read_checkpoint_file


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_checkpoint`.

    Attributes:
        source_format, target_format: formats of the names in the checkpoint and in the model.
        loaded: keys of the model that now hold the checkpoint's values.
        kept_initial: keys of the model that the checkpoint lacks.
        left_out: keys of the checkpoint that the model lacks.
        prefix: taken off the names in the checkpoint, where they are of a larger module, such as ``"model."``.
    """

    source_format: str
    target_format: str
    loaded: tuple[str, ...]
    kept_initial: tuple[str, ...]
    left_out: tuple[str, ...]
    prefix: str = ""

    def __str__(self) -> str:
        source = f"{self.source_format} behind {shown(self.prefix)}" if self.prefix else self.source_format
        return (
            f"loaded {len(self.loaded)} tensors ({source} -> {self.target_format}); "
            f"kept initial: {listing(self.kept_initial) or 'none'}; left out: {listing(self.left_out) or 'none'}"
        )


class MisfitError(ValueError):
    """Weights that do not fit the model: ``sentence`` says why, the whole text also what helps in Python."""

    def __init__(self, sentence: str, advice: str = ""):
        super().__init__(sentence + advice)
        self.sentence = sentence


def load_checkpoint(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    skip_head: bool = False,
    use_ema: bool = False,
) -> LoadReport:
    """Copy a ConvNeXt V2 or V1 checkpoint of any known format into a model of any code base.

    Both formats are recognised by names alone, see :func:`convert_state_dict`. Everything is checked before the first
    value is copied: an error leaves the model unchanged. Values are cast to the model's dtype and device.

    If the checkpoint lacks head, final norm or decoder, the model's keep their values; parts that only the checkpoint
    has are skipped; the report lists both. Within a part everything must match.

    Args:
        model: this library's ``ConvNeXtV2``, ``SparseEncoder`` or ``FCMAE``; a model of timm (``features_only``
            included), transformers, mmpretrain or torchvision; or any module with official names, dense or sparse. May
            be wrapped by DistributedDataParallel or torch.compile, or be part of a larger module, if no other ConvNeXt
            is.
        path_or_state_dict: a file (``.safetensors``, or of ``torch.save``), a folder with ``model.safetensors`` or
            ``pytorch_model.bin``, or the content of such a file. No code from a file is run.
        skip_head: keep the head of the model unchanged.
        use_ema: load the averaged weights, ``model_ema`` or ``state_dict_ema``, of a training checkpoint.

    Raises:
        FileNotFoundError: no such file.
        TypeError: an argument has the wrong type.
        ValueError: a file that is damaged, could run code or costs more than it holds; keys that are missing, unknown
            or of another shape, all in one message; a V1 file for a V2 model, or the reverse; several networks; no
            averaged weights for ``use_ema``; parameters that are no dense tensors with values; a file that records
            another GRN (:class:`.nn.GRNVariant`) than the model's, whose names and shapes are the same, or that
            records none and has one, of values other than zero, for a model without GRN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(path_or_state_dict, Mapping):
        content, what = path_or_state_dict, "path_or_state_dict"
        settings = content.get("config")
    elif isinstance(path_or_state_dict, (str, os.PathLike)):
        file = read_checkpoint_file(Path(path_or_state_dict))
        content, settings, what = file.content, file.settings, visible(str(path_or_state_dict))
    else:
        raise TypeError(f"path_or_state_dict must be a path or a state_dict, got {type(path_or_state_dict).__name__}")
    source = read_checkpoint(unwrap(content, use_ema, what), what)
    target = read_state(model.state_dict(), "model")
    _require_size(source, target)
    settings = settings if isinstance(settings, Mapping) else {}
    if not (is_v1(source.tensors) and settings.get("grn") == "none"):
        _require_grn(model, settings, what)
    if not isinstance(settings.get("grn"), str):
        _require_used_grn(model, source)
    common = {part_of(name) for name in source.keys} & {part_of(name) for name in target.keys}
    if skip_head:
        common.discard("head")
    ours = {name: tensor for name, tensor in target.tensors.items() if part_of(name) in common}
    theirs = {name: tensor for name, tensor in source.tensors.items() if part_of(name) in common}
    faults = []
    if missing := [target.keys[name] for name in ours if name not in theirs]:
        faults.append(f"it lacks {listing(missing)}")
    if unexpected := [source.keys[name] for name in theirs if name not in ours]:
        faults.append(f"the model has no place for {listing(unexpected)}")
    if misshaped := [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]:
        shapes = (f"{target.keys[n]} {list(theirs[n].shape)} instead of {list(ours[n].shape)}" for n in misshaped)
        faults.append(f"its shapes differ: {listing(shapes)}")
    if faults:
        only_head = {part_of(name) for name in misshaped} == {"head"}
        advice = " (skip_head=True leaves the head of the model as it is)" if only_head else ""
        raise MisfitError(f"{what} does not fit the model: {'; '.join(faults)}", advice)
    _copy({target.keys[name]: (tensor, theirs[name]) for name, tensor in ours.items()})
    return LoadReport(
        source.format.name,
        target.format.name,
        loaded=tuple(target.keys[name] for name in ours),
        kept_initial=tuple(key for name, key in target.keys.items() if name not in ours) + target.outside,
        left_out=tuple(key for name, key in source.keys.items() if name not in theirs) + source.outside,
        prefix=source.prefix,
    )


def _require_size(source: State, target: State) -> None:
    """Two versions, or two published sizes, are told by their names: what differs would fill pages."""
    given, wanted = block_kind(source.tensors), block_kind(target.tensors)
    if given != wanted:
        raise MisfitError(f"{source.what} does not fit the model: it is {given}, and the model is {wanted}")
    if any(f"stages.{stage}.0.dwconv.weight" not in target.tensors for stage in range(4)):
        return  # a backbone of fewer stages
    v1 = is_v1(source.tensors)
    size, other = (size_of(*architecture(state.tensors), v1) for state in (source, target))
    if size and other and size != other:
        raise MisfitError(f"{source.what} does not fit the model: it is {size}, and the model is {other}")


def _require_grn(model: nn.Module, settings: Mapping[str, Any], what: str) -> None:
    """Weights trained with one GRN mean nothing under another, and neither names nor shapes differ."""
    if not isinstance(stored := settings.get("grn"), str):
        return
    # The layers of this library have a variant that reads its text; those of other code bases are the default.
    variants: set[Any] = {
        module.variant for module in model.modules() if hasattr(getattr(module, "variant", None), "formula")
    }
    for variant in variants:
        try:
            stored = str(type(variant).of(stored))
        except ValueError:
            raise ValueError(f"{what} records an unknown GRN, {shown(stored)!r}") from None
    wanted = {str(variant) for variant in variants} or {"default"}
    if wanted != {stored}:
        raise MisfitError(
            f"{what} was trained with the GRN {shown(stored)!r}, and the model has {' and '.join(sorted(wanted))!r}"
        )


def _require_used_grn(model: nn.Module, source: State) -> None:
    """A model of this library with ``grn="none"`` has places for GRN's parameters, which it ignores."""
    variants: list[Any] = [module.variant for module in model.modules() if hasattr(module, "variant")]
    variants = [variant for variant in variants if hasattr(variant, "enabled")]
    if not variants or any(variant.enabled for variant in variants):
        return
    trained = [key for name, key in source.keys.items() if ".grn." in name and bool(source.tensors[name].any())]
    if trained:
        raise MisfitError(
            f"{source.what} does not fit the model: it was trained with GRN ({listing(trained)}), and the model has "
            "none",
            " (set its values to zero to leave it out)",
        )


def _copy(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """By key of the model: copy each second tensor into the first; if one cannot be written, restore those before
    it."""
    done: list[tuple[Tensor, Tensor]] = []
    for key, (into, values) in pairs.items():
        before = into.clone()
        try:
            into.copy_(values)
        except RuntimeError as error:
            for written, old in done:
                written.copy_(old)
            raise ValueError(f"the model's {key} cannot be written: {error}") from error
        done.append((into, before))
