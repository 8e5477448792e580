"""Loading a checkpoint of any format into a model of any code base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .formats import part_of
from .state import listing, read_checkpoint, read_state, unwrap
from .storage import read_file


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_checkpoint`.

    Attributes:
        source_format, target_format: formats of the names in the checkpoint and in the model.
        loaded: keys of the model that now hold the checkpoint's values.
        kept_initial: keys of the model that the checkpoint lacks.
        left_out: keys of the checkpoint that the model lacks.
    """

    source_format: str
    target_format: str
    loaded: tuple[str, ...]
    kept_initial: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"loaded {len(self.loaded)} tensors ({self.source_format} -> {self.target_format}); "
            f"kept initial: {listing(self.kept_initial) or 'none'}; left out: {listing(self.left_out) or 'none'}"
        )


def load_checkpoint(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    skip_head: bool = False,
    use_ema: bool = False,
) -> LoadReport:
    """Copy a ConvNeXt V2 checkpoint of any known format into a model of any code base.

    Both formats are recognised by names alone, see :func:`convert_state_dict`. Everything is checked before the first
    value is copied: an error leaves the model unchanged. Values are cast to the model's dtype and device.

    If the checkpoint lacks head, final norm or decoder, the model's keep their values; parts that only the checkpoint
    has are skipped; the report lists both. Within a part everything must match.

    Args:
        model: this library's ``ConvNeXtV2``, ``SparseEncoder`` or ``FCMAE``; a model of timm (``features_only``
            included), transformers or mmpretrain; or any module with official names, dense or sparse. May be wrapped by
            DistributedDataParallel or torch.compile.
        path_or_state_dict: a file (``.safetensors``, or of ``torch.save``), a folder with ``model.safetensors`` or
            ``pytorch_model.bin``, or the content of such a file. No code from a file is run.
        skip_head: keep the head of the model unchanged.
        use_ema: load the averaged weights, ``model_ema`` or ``state_dict_ema``, of a training checkpoint.

    Raises:
        FileNotFoundError: no such file.
        TypeError: an argument has the wrong type.
        ValueError: a file that is damaged or could run code; keys that are missing, unknown or of another shape, all
            in one message; no averaged weights for ``use_ema``; parameters on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(path_or_state_dict, Mapping):
        content, what = path_or_state_dict, "path_or_state_dict"
    elif isinstance(path_or_state_dict, (str, os.PathLike)):
        content, what = read_file(Path(path_or_state_dict)), str(path_or_state_dict)
    else:
        raise TypeError(f"path_or_state_dict must be a path or a state_dict, got {type(path_or_state_dict).__name__}")
    source = read_checkpoint(unwrap(content, use_ema, what), what)
    target = read_state(model.state_dict(), "model")
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
        hint = " (skip_head=True leaves the head of the model as it is)" if only_head else ""
        raise ValueError(f"{what} does not fit the model: {'; '.join(faults)}{hint}")
    _copy({target.keys[name]: (tensor, theirs[name]) for name, tensor in ours.items()})
    return LoadReport(
        source.format.name,
        target.format.name,
        loaded=tuple(target.keys[name] for name in ours),
        kept_initial=tuple(key for name, key in target.keys.items() if name not in ours),
        left_out=tuple(key for name, key in source.keys.items() if name not in theirs),
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
