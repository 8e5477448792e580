"""Foreign networks with ConvNeXt V2 blocks: timm's, transformers', and one written as the official code names it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peers import timm, transformers
from torch import Tensor, nn

TINY_SIZES = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, so that each part matters: GRN starts at zero, biases too."""
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
    """Like atto in kind, quick in size."""
    return timm_model(**TINY_SIZES, **options)


def transformers_model(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), **options) -> nn.Module:
    config = transformers.ConvNextV2Config(depths=list(depths), hidden_sizes=list(dims), num_labels=10, **options)
    return randomized(transformers.ConvNextV2ForImageClassification(config))


class OfficialNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class OfficialGRN(nn.Module):
    def __init__(self, dim: int, mean_eps: float = 1e-6):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, dim)) for _ in range(2))
        self.mean_eps = mean_eps

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = norm / (norm.mean(-1, keepdim=True) + self.mean_eps)
        return self.gamma * (x * response) + self.beta + x


class DropPath(nn.Module):
    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep


class Block(nn.Module):
    """The official block: its names, its order of operations."""

    def __init__(self, dim: int, drop_path: float = 0.0, mean_eps: float = 1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = OfficialNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = OfficialGRN(4 * dim, mean_eps)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.pwconv2(self.grn(self.act(self.pwconv1(self.norm(y)))))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


def official_model(drop_path: float = 0.0) -> nn.Module:
    """Two blocks between convolutions, ``[N, 3, H, W]`` -> ``[N, 10]``."""
    layers = [nn.Conv2d(3, 16, 4, stride=4), Block(16, drop_path), Block(16, drop_path)]
    return randomized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))


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
