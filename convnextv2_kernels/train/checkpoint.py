"""Checkpoints, written atomically, read back with a check, pruned to the last few; and weights exported for others.

A checkpoint holds whole tensors under the model's own names, however the run was spread, so that any number of
processes, sharded or not, can resume it.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .._console import visible
from .._files import atomic_file
from ..checkpoints.storage import load_torch
from ..errors import UserError, describe_error
from .checkpoint_checks import FORMAT, MOMENTS, check_format, named_groups, require_names
from .distributed import World
from .optim import Average

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})\.pt")  # as checkpoint_path writes them


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the name of the checkpoint taken after ``step`` steps."""
    return folder / f"checkpoint-{step}.pt"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the checkpoints in a folder, newest first."""
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted(found, reverse=True)


def whole_model(network: nn.Module) -> dict[str, Tensor]:
    """Return the model's whole tensors on the CPU in the first process, nothing in the others; all must call it."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def gather_state(network: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> dict[str, Any]:
    """Return weights, optimiser state and moving average as :func:`whole_model` returns weights."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {"model": whole_model(network), "optimizer": get_optimizer_state_dict(network, optimizer, options=options)}
    if average is not None:
        with average.applied(network):
            # A copy: without processes the "whole" tensors are the model's own, about to be put back.
            state["model_ema"] = {name: tensor.clone() for name, tensor in whole_model(network).items()}
    return state


def restore_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    state: dict[str, Any] | None,
    world: World,
) -> None:
    """Put what :func:`gather_state` returned into place. ``state`` is needed in the first process only.

    The optimiser keeps the hyperparameters that it has. Raises UserError, in all processes and before anything is
    touched, where a tensor is missing or has no place.
    """
    world.from_main(lambda: _require_complete(network, optimizer, average, state or {}))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
    # Only the first process reads them; each call would otherwise leave its mark in the checkpoint.
    weights, averages, moments = ({}, {}, {}) if state is None else (dict(state["model"]), {}, state["optimizer"])
    if average is not None:
        averages = {} if state is None else dict(state["model_ema"])
        set_model_state_dict(network, averages, options=options)
        average.take(network)
    set_model_state_dict(network, weights, options=options)
    if state is not None:
        moments = {"state": moments["state"], "param_groups": named_groups(network, optimizer)}
    set_optimizer_state_dict(network, optimizer, moments, options=options)


def _require_complete(
    network: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None, state: dict[str, Any]
) -> None:
    """PyTorch would keep the values of the network where a tensor is missing, even if told to be strict."""
    try:
        for part in ("model",) if average is None else ("model", "model_ema"):
            require_names(part, state[part], network.state_dict())
        entries = state["optimizer"]["state"]
        require_names("optimizer.state", entries, [n for g in named_groups(network, optimizer) for n in g["params"]])
        for name, entry in entries.items():
            require_names(f"optimizer.state.{name}", entry, ("step", *MOMENTS))
    except ValueError as error:
        raise UserError(f"the checkpoint cannot be restored: {error}") from error


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write checkpoint-<step>.pt; it has that name only once it is complete and on disk.

    Raises UserError where a weight or a moment of the optimiser is not finite (nothing could resume from it) or the
    file cannot be written.
    """
    for what, tensor in _tensors(state):
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"step {step}: {what} is no longer finite; no checkpoint was written. "
                "The newest one before it is still good: try a lower --lr or a longer warm-up."
            )
    path = checkpoint_path(folder, step)
    try:
        with atomic_file(path) as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {describe_error(error)}") from error
    return path


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a network and its optimiser, each with its name for a person."""
    for name, tensor in state["model"].items():
        yield f"parameter {name}", tensor
    for name, tensor in state.get("model_ema", {}).items():
        yield f"the average of parameter {name}", tensor
    for name, entry in state["optimizer"]["state"].items():
        for moment in MOMENTS:
            yield f"the optimiser's {moment} of parameter {name}", entry[moment]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; raise UserError where it is damaged or of another kind."""
    try:
        return _load(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def _load(path: Path) -> dict[str, Any]:
    """:func:`load_checkpoint`, but with a ValueError, whose sentence names the file."""
    try:
        state = load_torch(path)
    except (OSError, ValueError) as error:
        text = visible(getattr(error, "strerror", None) or str(error))
        raise ValueError(text if str(path) in text else f"{path}: not a readable checkpoint ({text})") from error
    try:
        check_format(state)
    except ValueError as error:
        raise ValueError(f"{path}: not a checkpoint of this program (format {FORMAT}): {error}") from error
    return state


def newest_valid(
    folder: Path, check: Callable[[dict[str, Any], int, Path], None] | None = None
) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
    """Load the newest valid checkpoint of a folder.

    ``check`` gets the content of a checkpoint, the step in its name and its path, and raises ValueError, with a
    sentence about a field, where it is damaged. Returns (state, path, warnings), one warning for each damaged
    checkpoint passed over, and (None, None, []) where there is none at all. Raises UserError where all are damaged: to
    start again from nothing is for the user to decide.
    """
    warnings = []
    for step, path in list_checkpoints(folder):
        try:
            state = _load(path)
            if check is not None:
                _check(state, step, path, check)
        except ValueError as error:
            warnings.append(f"{error}; it is passed over")
        else:
            return state, path, warnings
    if warnings:
        raise UserError(
            f"{folder}: every checkpoint is damaged; give a new --output, or delete them to start "
            "afresh. " + " ".join(f"{warning}." for warning in warnings)
        )
    return None, None, []


def _check(state: dict[str, Any], step: int, path: Path, check: Callable[[dict[str, Any], int, Path], None]) -> None:
    try:
        check(state, step, path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def prune_checkpoints(folder: Path, newest: int, max_checkpoints: int) -> None:
    """Delete all but the last ``max_checkpoints`` checkpoints up to step ``newest``.

    One of a later step can only be a damaged one that was passed over; it is left for the user to
    see until the run writes that step again.
    """
    for _, path in [c for c in list_checkpoints(folder) if c[0] <= newest][max_checkpoints:]:
        with suppress(OSError):  # tried again after the next checkpoint
            path.unlink(missing_ok=True)


def rng_state() -> dict[str, Any]:
    """Return the global random states of PyTorch and Python in types ``weights_only`` can load."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned. Training draws from none of them; what a user adds to it may."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


ENCODER_PREFIX = "encoder."


def export_encoder(
    path: Path, model: nn.Module, about: str | Mapping[str, str], weights: Mapping[str, Tensor] | None = None
) -> int:
    """Write the encoder's weights as safetensors, without the ``encoder.`` prefix; return how many.

    Decoder, projection and mask token are left out; they have no use after pre-training. ``weights`` stand in for the
    model's own where given, as its moving average does. The file's metadata are ``about`` (:func:`.weights.describe`,
    or the name of the model alone) and the GRN.
    """
    weights = model.state_dict() if weights is None else weights
    tensors = {n.removeprefix(ENCODER_PREFIX): tensor for n, tensor in weights.items() if n.startswith(ENCODER_PREFIX)}
    metadata = {"model": about} if isinstance(about, str) else dict(about)
    metadata["grn"] = str(model.grn)
    scope = model.encoder.stages[0][0].grn.scope
    if scope != "image":
        metadata["grn_scope"] = scope
    return export_weights(path, tensors, metadata)


def export_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write tensors as safetensors with metadata; return how many. Raises UserError where they cannot be written."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_file(path) as file:
            file.write(save(plain, metadata={"format": "pt", **metadata}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return len(plain)
