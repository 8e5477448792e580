"""Tiny networks whose GRN does something."""

import torch

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
