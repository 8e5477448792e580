"""A state_dict of any known format, read under canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import WRITABLE, Format, complete, detect
from .shapes import to_canonical

_WEIGHTS = ("model", "state_dict", "model_state_dict")
_AVERAGED_WEIGHTS = ("model_ema", "state_dict_ema")
_WRAPPERS = {"module", "_orig_mod"}  # inserted into names by DataParallel and torch.compile, at any depth
_COUNTERS = {"n_averaged"}  # beside the parameters of torch.optim.swa_utils.AveragedModel


class State(NamedTuple):
    """By canonical name: views in the canonical shapes, and the keys of these tensors in ``original``."""

    format: Format
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    original: Mapping[str, Tensor]


def listing(items: Iterable[str], limit: int = 8) -> str:
    """The first few, and the number of others."""
    items = list(items)
    text = ", ".join(items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def unwrap(checkpoint: Mapping[str, Any], use_ema: bool, what: str) -> Mapping[str, Any]:
    """The state_dict in a training checkpoint, or the mapping itself if it is a state_dict.

    Raises:
        ValueError: ``use_ema`` without averaged weights. The message calls the checkpoint ``what``.
    """
    for name in _AVERAGED_WEIGHTS if use_ema else _WEIGHTS:
        if isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    if use_ema:
        raise ValueError(
            f"use_ema=True needs averaged weights, expected {' or '.join(_AVERAGED_WEIGHTS)} in {what}, "
            f"got {listing(map(str, checkpoint)) or 'nothing at all'}"
        )
    return checkpoint


def read_state(state_dict: Mapping[str, Any], what: str) -> State:
    """Recognise the format by the keys, and check every key and tensor.

    Raises:
        ValueError: anything but the parameters of a ConvNeXt V2 or a part of it. The message calls the state_dict
            ``what``.
    """
    state_dict = {key: value for key, value in state_dict.items() if key not in _COUNTERS}
    bare = {key: _without_wrappers(key) for key in state_dict if isinstance(key, str)}
    found = detect(bare.values())
    if found is None:
        raise ValueError(
            f"{what} is no ConvNeXt V2, expected names as in {', '.join(WRITABLE)}, got "
            f"{listing(map(str, state_dict)) or 'nothing at all'}"
        )
    known = {key: found.canonical(bare[key]) if key in bare else None for key in state_dict}
    if unknown := [str(key) for key, name in known.items() if name is None]:
        raise ValueError(f"{what} has keys that are not of a ConvNeXt V2 with {found.name} names: {listing(unknown)}")
    names = {key: name for key, name in known.items() if name is not None}
    keys = {name: key for key, name in names.items()}
    if twice := [key for key, name in names.items() if keys[name] != key]:
        raise ValueError(f"{what} has these keys both with and without module. or _orig_mod.: {listing(twice)}")
    if bad := [f"{key} is {fault}" for key, value in state_dict.items() if (fault := _fault(value))]:
        raise ValueError(f"{what} must hold dense floating-point tensors, but {listing(bad)}")
    tensors, misshaped = {}, []
    for name, key in keys.items():
        try:
            tensors[name] = to_canonical(name, state_dict[key].detach())
        except ValueError:
            misshaped.append(f"{key} {list(state_dict[key].shape)}")
    if misshaped:
        raise ValueError(f"{what} has shapes that no ConvNeXt V2 has: {listing(misshaped)}")
    return State(found, tensors, keys, state_dict)


def read_checkpoint(state_dict: Mapping[str, Any], what: str) -> State:
    """:func:`read_state` of a complete encoder, with or without norm, head and decoder, each of them complete.

    Raises:
        ValueError: as :func:`read_state`, or parameters are missing.
    """
    state = read_state(state_dict, what)
    own = state.format.own
    if missing := [own(name) or name for name in complete(state.tensors) if name not in state.tensors]:
        raise ValueError(f"{what} lacks parameters of a ConvNeXt V2 with {state.format.name} names: {listing(missing)}")
    return state


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _fault(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if not value.dtype.is_floating_point:
        return f"of dtype {value.dtype}"
    if value.layout != torch.strided:
        return f"of layout {value.layout}"
    if value.is_meta:
        return "on the meta device, without values"
    if type(value).__name__ == "DTensor":  # importing its class would import all of torch.distributed
        return "sharded (a DTensor): load before sharding, or gather it with full_tensor()"
    return "without its memory" if value.numel() and not value.untyped_storage().nbytes() else None
