"""Networks of other libraries with ConvNeXt V2 blocks: timm's, transformers', and one named like the official code."""

from __future__ import annotations

import torch
from helpers.official import OfficialConvNeXtV2
from helpers.reference_models import timm, transformers
from torch import Tensor, nn

TINY_SIZES = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraws every parameter, so that each part matters: GRN and biases are initialised to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "grn" in name:
            value = 0.5 * noise
        elif p.dim() > 1:
            value = noise * (p.shape[0] / p.numel()) ** 0.5
        elif name.endswith("bias"):
            value = 0.2 * noise
        else:
            value = 1 + 0.2 * noise
        with torch.no_grad():
            p.copy_(value)
    return model


def timm_model(size: str = "convnextv2_atto", **options) -> nn.Module:
    return randomized(timm.create_model(size, **{"num_classes": 10, **options}))


def small_timm_model(**options) -> nn.Module:
    """Structured like atto, but small."""
    return timm_model(**TINY_SIZES, **options)


def transformers_model(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), **options) -> nn.Module:
    config = transformers.ConvNextV2Config(depths=list(depths), hidden_sizes=list(dims), num_labels=10, **options)
    return randomized(transformers.ConvNextV2ForImageClassification(config))


def official_model(drop_path_rate: float = 0.0) -> nn.Module:
    return randomized(OfficialConvNeXtV2(**TINY_SIZES, num_classes=10, drop_path_rate=drop_path_rate))


def close(got: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding in another order, carried through a dozen layers: about a thousand epsilons."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def results_of(model: nn.Module, images: Tensor, cotangent: Tensor | None = None) -> dict[str, Tensor]:
    """Logits, and for a cotangent the gradients of the images and of every parameter."""
    images = images.clone().requires_grad_(cotangent is not None)
    out = output_of(model, images)
    results = {"logits": out.detach()}
    if cotangent is None:
        return results
    model.zero_grad(set_to_none=True)
    out.backward(cotangent.to(out.dtype))
    results["images"] = images.grad
    return results | {name: p.grad.clone() for name, p in model.named_parameters()}
