"""Checkpoints, written atomically, read back with a check, pruned to the last few; and weights exported for others.

A checkpoint holds whole tensors under the model's own names, however the run was spread, so that any number of
processes, sharded or not, can resume it.
"""

import random
import re
import zipfile
from collections.abc import Mapping
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

from .._files import atomic_file
from ..errors import UserError, describe_error
from .distributed import World
from .optim import Average

FORMAT = 2
REQUIRED = {"format", "model", "optimizer", "step", "epoch", "position", "rng", "config"}
_NAME = re.compile(r"checkpoint-(\d+)\.pt")


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
    """Put what :func:`gather_state` returned into place. ``state`` is needed in the first process only."""
    state = state or {"model": {}, "optimizer": {}, "model_ema": {}}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
    if average is not None:
        set_model_state_dict(network, state["model_ema"], options=options)
        average.take(network)
    set_model_state_dict(network, state["model"], options=options)
    set_optimizer_state_dict(network, optimizer, state["optimizer"], options=options)


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write checkpoint-<step>.pt; it has that name only once it is complete and on disk.

    Raises UserError where a weight is not finite (nothing could resume from it) or the file cannot be
    written.
    """
    for name, tensor in state["model"].items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"step {step}: parameter {name} is no longer finite; no checkpoint was written. "
                "The newest one before it is still good: try a lower --lr or a longer warm-up."
            )
    path = checkpoint_path(folder, step)
    try:
        with atomic_file(path) as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {describe_error(error)}") from error
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; raise UserError where it is damaged or of another kind."""
    try:
        # torch.load trusts the bytes of a tensor; the archive's checksums catch flipped ones.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path}: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # A damaged archive makes zipfile and the unpickler raise anything.
        raise UserError(f"{path}: not a readable checkpoint ({describe_error(error)})") from error
    if not isinstance(state, dict) or not state.keys() >= REQUIRED or state["format"] != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program (format {FORMAT})")
    return state


def newest_valid(folder: Path) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
    """Load the newest valid checkpoint of a folder.

    Returns (state, path, warnings), one warning for each damaged checkpoint passed over, and
    (None, None, []) where there is none at all. Raises UserError where all are damaged: to
    start again from nothing is for the user to decide.
    """
    warnings = []
    for _, path in list_checkpoints(folder):
        try:
            return load_checkpoint(path), path, warnings
        except UserError as error:
            warnings.append(f"{error}; it is passed over")
    if warnings:
        raise UserError(
            f"{folder}: every checkpoint is damaged; give a new --output, or delete them to start "
            "afresh. " + " ".join(f"{warning}." for warning in warnings)
        )
    return None, None, []


def prune_checkpoints(folder: Path, newest: int, max_checkpoints: int) -> None:
    """Delete all but the last ``max_checkpoints`` checkpoints up to step ``newest``.

    One of a later step can only be a damaged one that was passed over; it is left for the user to
    see until the run writes that step again.
    """
    for _, path in [c for c in list_checkpoints(folder) if c[0] <= newest][max_checkpoints:]:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written. Only for the process that owns the folder."""
    for path in folder.glob(".*.tmp"):
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
    """Write tensors as safetensors with metadata; return how many."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as file:
        file.write(save(plain, metadata={"format": "pt", **metadata}))
    return len(plain)
