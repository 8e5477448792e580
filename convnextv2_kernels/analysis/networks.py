"""The networks that an analysis compares: a checkpoint of any known format, or an untrained network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._console import visible
from .._files import open_regular, parse_json
from ..checkpoints import load_checkpoint
from ..checkpoints.state import architecture, count_blocks, is_v1, read_checkpoint, require_consistent, shown, unwrap
from ..checkpoints.storage import CheckpointFile, read_checkpoint_file
from ..data.value_range import Range, range_of
from ..models import FCMAE, ConvNeXtV2Features, get_config
from ..sizes import V1_BLOCK, V1_NAMES, size_of

IMG_SIZE = (224, 224)
MASK_RATIO = 0.6


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode under the name it has in a plot.

    ``about``: what it is, in plain types for a result file. ``img_size``, ``mask_ratio``: of its training where the
    checkpoint tells, else the paper's 224 px and 0.6. ``value_range``: what its training mapped grey values of more
    than 8 bits from, None where the checkpoint records nothing.
    """

    label: str
    model: nn.Module
    about: dict[str, Any]
    img_size: tuple[int, int] = IMG_SIZE
    mask_ratio: float = MASK_RATIO
    value_range: Range | None = None


def load_network(
    path: Path,
    label: str,
    model_name: str | None = None,
    use_ema: bool = False,
    decoder: bool = False,
    device: str | torch.device = "cpu",
) -> Network:
    """The network of a checkpoint. Widths and depths are read from the weights.

    A checkpoint of this library's training also tells its GRN, sizes and normalisation of the target, in ``config``; an
    ``encoder.safetensors`` its GRN and the size of its images, in the metadata. Anything else has the paper's default.

    Args:
        path: a file or folder as :func:`convnextv2_kernels.load_checkpoint` takes it.
        model_name: ``convnextv2_<size>``, or ``convnext_<size>`` of V1, that the weights are expected to be, or None.
        use_ema: take the averaged weights of a training checkpoint.
        decoder: build the whole FCMAE; otherwise only the four stages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, no ConvNeXt, not ``model_name``, or without the requested part.
    """
    file, what = read_checkpoint_file(path), visible(str(path))
    weights = unwrap(file.content, use_ema, what)
    state = read_checkpoint(weights, what)
    settings = _settings(file)
    depths, dims = architecture(state.tensors)
    v1 = is_v1(state.tensors)
    if model_name is not None and (get_config(model_name), model_name in V1_NAMES) != ((depths, dims), v1):
        this = size_of(depths, dims, v1) or f"a network of depths {depths} and widths {dims}"
        raise ValueError(f"{what}: this is {this}, expected {model_name}")
    if (in_chans := state.tensors["downsample_layers.0.0.weight"].shape[1]) != 3:
        raise ValueError(f"{what} is a network for images of {in_chans} channels, expected 3")
    if decoder and "mask_token" not in state.tensors:
        raise ValueError(f"{what} has no decoder: reconstructions need a checkpoint of FCMAE training")
    require_consistent(state)
    grn, scope = settings.get("grn", "default"), settings.get("grn_scope", "image")
    block: dict[str, Any] = dict(V1_BLOCK) if v1 else {"grn": grn}
    model: nn.Module
    try:
        size, ratio = _pair(settings.get("img_size", IMG_SIZE)), float(settings.get("mask_ratio", MASK_RATIO))
        if decoder:
            model = FCMAE(
                depths,
                dims,
                img_size=size,
                patch_size=settings.get("patch_size", 32),
                mask_ratio=ratio,
                norm_pix_loss=settings.get("norm_pix_loss", True),
                decoder_depth=count_blocks(state.tensors, r"decoder\.(\d+)\.") or settings.get("decoder_depth", 1),
                decoder_embed_dim=state.tensors["proj.weight"].shape[0],
                grn_scope=scope,
                **block,
                # masked dense encoding has the numbers of the sparse one
                encoding="dense" if settings.get("encoding") == "dense" else "sparse",
                decoder=settings.get("decoder", "convnext"),
            )
        else:
            model = ConvNeXtV2Features(depths=depths, dims=dims, **block)
            # A backbone of maps has GRN per image only; the scope holds no parameters.
            for layer in (layer for stage in model.stages for layer in stage):
                layer.grn.scope = scope
    except (TypeError, ValueError, OverflowError, ImportError) as error:
        raise ValueError(f"{what} cannot be rebuilt from its settings: {shown(str(error))}") from error
    try:
        load_checkpoint(model, {"model": weights, "config": {"grn": block["grn"]}})
    except ValueError as error:
        raise ValueError(f"{what}{str(error).removeprefix('path_or_state_dict')}") from error
    about = {
        "checkpoint": file.path.name,
        "sha256": digest_of_file(file.path),
        "format": state.format.name,
        "averaged_weights": use_ema,
        "model": size_of(depths, dims, v1),
        "depths": list(depths),
        "dims": list(dims),
        "grn": block["grn"],
        "grn_scope": scope,
        "step": step if isinstance(step := file.content.get("step"), int) else None,
        "norm_pix_loss": model.norm_pix_loss if decoder else None,
    }
    value_range = range_of(settings.get("value_range"))
    return Network(label, model.eval().to(device), about, size, ratio, value_range)


def untrained_network(
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    label: str = "untrained",
    seed: int = 0,
    device: str | torch.device = "cpu",
    v1: bool = False,
) -> Network:
    """A network of V2, or of V1, with initial weights drawn from ``seed``; GRN starts as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNeXtV2Features(depths=depths, dims=dims, **(V1_BLOCK if v1 else {}))
    about = {
        "checkpoint": None,
        "model": size_of(depths, dims, v1),
        "depths": list(depths),
        "dims": list(dims),
        "seed": seed,
    }
    return Network(label, model.eval().to(device), about)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if not all(isinstance(side, int) and 0 < side < 1 << 16 for side in (height, width)):
        raise ValueError(f"img_size must be one or two numbers of pixels, got {size!r}")
    return height, width


def _settings(file: CheckpointFile) -> Mapping[str, Any]:
    """The ``config`` of a training checkpoint, or what the metadata of a safetensors file say of a network's use."""
    metadata = file.metadata
    if file.settings is not metadata:
        return file.settings
    told: dict[str, Any] = {n: metadata[n] for n in ("grn", "grn_scope", "value_range") if n in metadata}
    if "img_size" in metadata:
        what = f"img_size in the metadata of {visible(str(file.path))}"
        told["img_size"] = parse_json(metadata["img_size"].encode("utf-8", "surrogatepass"), what)
    return told


def digest_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open_regular(file) as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
