"""Tiny networks whose GRN does something, and pictures of classes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from convnextv2_kernels.models import FCMAE, ConvNeXtV2

DEPTHS, DIMS = (1, 2, 1, 1), (8, 8, 16, 16)


def stir(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters drawn from ``seed`` alone: at their initial values GRN is the identity and all maps are tiny."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0  # LayerNorm
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(centre + 0.4 * drawn)
    return model


def network(seed: int = 0, **changes: object) -> ConvNeXtV2:
    return stir(ConvNeXtV2(depths=DEPTHS, dims=DIMS, num_classes=3, **changes), seed)


def autoencoder(seed: int = 0, **changes: object) -> FCMAE:
    return stir(FCMAE(DEPTHS, DIMS, img_size=64, decoder_embed_dim=16, **changes), seed)


def images(n: int, height: int = 64, width: int = 64, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def picture(index: int, size: tuple[int, int] = (80, 72)) -> Image.Image:
    """A smooth picture of (width, height), different for each index."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((index + 1 + c) * x / 23 + c) * np.cos((index + 2) * y / 19) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


def class_folder(folder: Path, classes: int = 3, each: int = 4) -> Path:
    """``each`` pictures in each of the subfolders class0, class1, ..."""
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            picture(label * each + number).save(folder / f"class{label}" / f"{number}.png")
    return folder
