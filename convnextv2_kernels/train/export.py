"""The encoder alone, under the official dense names: what fine-tuning starts from."""

from pathlib import Path

from safetensors.torch import save
from torch import nn

from ..files import atomic_file

PREFIX = "encoder."


def export_encoder(path: Path, model: nn.Module, model_name: str) -> int:
    """Write the encoder's weights as safetensors, without the ``encoder.`` prefix; return how many.

    Decoder, projection and mask token are left out; they have no use after pre-training.
    """
    tensors = {
        name.removeprefix(PREFIX): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(PREFIX)
    }
    with atomic_file(path) as file:
        file.write(save(tensors, metadata={"format": "pt", "model": model_name}))
    return len(tensors)
