"""A state_dict of any known format, read under canonical names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._console import visible
from .formats import OTHER_LAYER, V1, V2, WRITABLE, Format, block_kind, complete, networks_in
from .pickles import StandIn
from .shapes import contradictions, to_canonical

MAX_KEYS = 100_000  # of a state_dict; the largest published size has 441
_MAX_KEY_LENGTH = 1000
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net", "network")
AVERAGED_WEIGHTS = ("model_ema", "state_dict_ema")
_WRAPPERS = {"module", "_orig_mod"}  # inserted into names by DataParallel and torch.compile, at any depth
_COUNTERS = {"n_averaged"}  # beside the parameters of torch.optim.swa_utils.AveragedModel
_BATCHES = ".grn.layer.num_batches_tracked", ".bn.num_batches_tracked"  # counters of batch norms
_NESTING = 4


class State(NamedTuple):
    """By canonical name: views in the canonical shapes, and the keys of these tensors in ``original``.

    The keys begin with ``prefix``, the name of the network in a larger module; ``outside`` are the keys that do not.
    Errors call the state_dict ``what``.
    """

    format: Format
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    original: Mapping[str, Tensor]
    prefix: str
    outside: tuple[str, ...]
    what: str


def shown(text: str, limit: int = 200) -> str:
    """Text of a file as an error quotes it: on one line, and not too long."""
    text = visible(text[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}..."


def listing(items: Iterable[str], limit: int = 8) -> str:
    """The first few, and the number of others."""
    items = list(items)
    text = ", ".join(shown(item, 100) for item in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def unwrap(checkpoint: Mapping[str, Any], use_ema: bool, what: str) -> Mapping[str, Any]:
    """The state_dict in a training checkpoint, or the mapping itself if it is a state_dict.

    Raises:
        ValueError: ``use_ema`` without averaged weights, or nothing else; several networks. The message calls the
            checkpoint ``what``.
    """
    if use_ema:
        averaged = next((name for name in AVERAGED_WEIGHTS if isinstance(checkpoint.get(name), Mapping)), None)
        if averaged is None:
            raise ValueError(
                f"{what} has no averaged weights, expected {' or '.join(AVERAGED_WEIGHTS)}, "
                f"got {listing(map(str, checkpoint)) or 'nothing at all'}"
            )
        checkpoint = checkpoint[averaged]
    for _ in range(_NESTING):
        inner = next((name for name in _WEIGHTS if isinstance(checkpoint.get(name), Mapping)), None)
        if inner is None:
            break
        checkpoint = checkpoint[inner]
    else:
        return checkpoint
    named = [name for name, value in checkpoint.items() if isinstance(value, Mapping) and _networks(value)]
    weights = [name for name in named if name not in AVERAGED_WEIGHTS]
    if len(weights) > 1:
        raise ValueError(f"{what} holds several networks, expected one: {listing(map(str, weights))}")
    if named and not weights:
        raise ValueError(f"{what} holds averaged weights only, under {listing(map(str, named))}: ask for these")
    return checkpoint[weights[0]] if weights else checkpoint


def read_state(state_dict: Mapping[str, Any], what: str) -> State:
    """Recognise the format by the keys, and check every key and tensor.

    The network may be part of a larger module: its keys then have a prefix, such as ``model.``, and other keys are left
    alone.

    Raises:
        ValueError: anything but the parameters of a ConvNeXt V2 or V1 or a part of it; several networks. The message
            calls the state_dict ``what``.
    """
    if len(state_dict) > MAX_KEYS:
        raise ValueError(f"{what} has {len(state_dict)} keys, of which at most {MAX_KEYS} are read")
    state_dict = {key: value for key, value in state_dict.items() if key not in _COUNTERS}
    bare = {key: _without_wrappers(key) for key in state_dict if _is_name(key)}
    networks = networks_in(bare.values())
    if not networks:
        raise ValueError(
            f"{what} is no ConvNeXt, expected names as in {', '.join(WRITABLE)}, got "
            f"{listing(map(str, state_dict)) or 'nothing at all'}"
        )
    if len(networks) > 1:
        prefixes = (prefix or "no prefix" for prefix in networks)
        raise ValueError(f"{what} holds several networks, expected one: their keys begin with {listing(prefixes)}")
    prefix, found = _reading(next(iter(networks.values())), bare, len(state_dict))
    inside = [key for key in state_dict if not prefix or bare.get(key, "").startswith(prefix)]
    known = {key: found.canonical(bare[key][len(prefix) :]) if key in bare else None for key in inside}
    if unknown := [str(key) for key, name in known.items() if name is None]:
        raise ValueError(f"{what} has keys that are not of a ConvNeXt with {found.name} names: {listing(unknown)}")
    names = {key: name for key, name in known.items() if name is not None}
    keys = {name: key for key, name in names.items()}
    if twice := [key for key, name in names.items() if keys[name] != key]:
        raise ValueError(f"{what} has these keys both with and without module. or _orig_mod.: {listing(twice)}")
    if bad := [f"{key} is {fault}" for key in inside if (fault := _fault(state_dict[key], names[key]))]:
        raise ValueError(f"{what} must hold dense floating-point tensors, but {listing(bad)}")
    tensors, misshaped = {}, []
    for name, key in keys.items():
        try:
            tensors[name] = to_canonical(name, state_dict[key].detach())
        except ValueError:
            misshaped.append(f"{key} {list(state_dict[key].shape)}")
    if misshaped:
        raise ValueError(f"{what} has shapes that no ConvNeXt has: {listing(misshaped)}")
    outside = tuple(str(key) for key in state_dict if key not in names)
    return State(found, tensors, keys, state_dict, prefix, outside, what)


def read_checkpoint(state_dict: Mapping[str, Any], what: str) -> State:
    """:func:`read_state` of a complete encoder, with or without norm, head and decoder, each of them complete.

    Raises:
        ValueError: as :func:`read_state`, or parameters are missing.
    """
    state = read_state(state_dict, what)
    own = state.format.own
    if (block := block_kind(state.tensors)) not in (V1, V2, OTHER_LAYER):
        raise ValueError(f"{what} is {block}, expected one of the two (V2 has GRN, V1 has layer scale)")
    if missing := [own(name) or name for name in complete(state.tensors) if name not in state.tensors]:
        raise ValueError(f"{what} lacks parameters of a ConvNeXt with {state.format.name} names: {listing(missing)}")
    return state


def require_consistent(state: State) -> None:
    """Look at the shapes of a complete checkpoint before anything of their sizes is built.

    Raises:
        ValueError: shapes that contradict each other, or parameters that share memory, so that copies would cost more.
    """
    if wrong := contradictions(state.tensors):
        shapes = (f"{state.keys[n]} {list(state.tensors[n].shape)} (expected {list(wrong[n])})" for n in wrong)
        raise ValueError(f"{state.what} has shapes that contradict each other: {listing(shapes)}")
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.tensors.values()
    }
    claimed, held = sum(tensor.nbytes for tensor in state.tensors.values()), sum(storages.values())
    if claimed > held:
        raise ValueError(f"{state.what} has parameters that share memory: {claimed} bytes of them in {held} bytes")


def is_v1(tensors: Iterable[str]) -> bool:
    """Whether these canonical names are of ConvNeXt V1."""
    return block_kind(tensors) == V1


def architecture(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(depths, dims)`` of a state_dict with four stages under canonical names."""
    depths = tuple(count_blocks(tensors, rf"stages\.{stage}\.(\d+)\.") for stage in range(4))
    return depths, tuple(tensors[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in range(4))


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """The number of different indices, the first group of ``pattern``, among canonical names."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def _networks(mapping: Mapping[Any, Any]) -> bool:
    return bool(networks_in(_without_wrappers(key) for key in mapping if _is_name(key)))


def _reading(readings: list[tuple[str, Format]], bare: Mapping[Any, str], total: int) -> tuple[str, Format]:
    """The first of a network's readings that knows every key, else the first: a module called ``encoder`` may be of an
    FCMAE, or a whole network with norm and head."""

    def knows_all(reading: tuple[str, Format]) -> bool:
        prefix, known = reading
        return all(key.startswith(prefix) and known.canonical(key[len(prefix) :]) for key in bare.values())

    if len(bare) < total:  # other keys than names
        return readings[0]
    return next(filter(knows_all, readings), readings[0])


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and len(key) <= _MAX_KEY_LENGTH


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _fault(value: Any, name: str) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {value.kind if isinstance(value, StandIn) else type(value).__name__}"
    if isinstance(value, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        return "not initialised yet"
    if value.is_nested:
        return "a nested tensor"
    if not value.dtype.is_floating_point and not (name.endswith(_BATCHES) and value.dtype == torch.int64):
        return f"of dtype {value.dtype}"
    if value.layout != torch.strided:
        return f"of layout {value.layout}"
    if value.is_meta:
        return "on the meta device, without values"
    if type(value).__name__ == "DTensor":  # importing its class would import all of torch.distributed
        return "sharded (a DTensor): load before sharding, or gather it with full_tensor()"
    return "without its memory" if value.numel() and not value.untyped_storage().nbytes() else None
