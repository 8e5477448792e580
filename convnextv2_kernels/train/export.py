"""Weights for others: the encoder alone, which fine-tuning starts from, and a classifier."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from .._atomic_io import atomic_file

PREFIX = "encoder."


def export_encoder(path: Path, model: nn.Module, model_name: str, weights: Mapping[str, Tensor] | None = None) -> int:
    """Write the encoder's weights as safetensors, without the ``encoder.`` prefix; return how many.

    Decoder, projection and mask token are left out; they have no use after pre-training. ``weights`` stand in for the
    model's own where given, as its moving average does. The file's metadata name the model and its GRN.
    """
    weights = model.state_dict() if weights is None else weights
    tensors = {n.removeprefix(PREFIX): tensor for n, tensor in weights.items() if n.startswith(PREFIX)}
    metadata = {"model": model_name, "grn": str(model.grn)}
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
