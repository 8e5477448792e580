"""Channels of one image's feature map that do nothing: near zero everywhere, or the same everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout import PatchLayout

DEAD = 0.01
SATURATED = 0.05


def rows_by_image(features: Tensor, layout: PatchLayout | None = None) -> Iterator[Tensor]:
    """``[sites, C]`` of each image of ``features [N, H, W, C]``, or packed ``[P, s, s, C]``: its visible sites.

    Raises:
        ValueError: features of another rank, or of another number of patches than the layout's.
    """
    if features.dim() != 4:
        raise ValueError(f"features must have shape [N, H, W, C] or [P, s, s, C], got {list(features.shape)}")
    if layout is None:
        yield from features.flatten(1, 2)
        return
    if features.shape[0] != layout.num_patches:
        raise ValueError(f"features must hold the layout's {layout.num_patches} patches, got {list(features.shape)}")
    offsets = layout.image_offsets.tolist()
    for begin, end in itertools.pairwise(offsets):
        yield features[begin:end].flatten(0, 2)


def channels_near_zero(rows: Tensor, share: float = DEAD) -> Tensor:
    """Which channels of ``rows [sites, C]`` are dead: bool ``[C]``.

    A channel is dead in an image where its greatest absolute value is at most ``share`` of the root mean square of all
    channels and sites. (The paper speaks of dead feature maps but gives no threshold.) GELU never gives an exact zero,
    so "equal to zero" would find none. Without sites, or where everything is zero, all are dead.
    """
    check_share("dead", share)
    scale = rows.double().square().mean().sqrt() if rows.numel() else rows.new_zeros((), dtype=torch.float64)
    return _largest(rows) <= share * scale


def channels_near_constant(rows: Tensor, share: float = SATURATED, dead: float = DEAD) -> Tensor:
    """Which channels of ``rows [sites, C]`` are saturated: bool ``[C]``.

    A channel is saturated in an image where it is not dead and its deviation over the sites is at most ``share`` of
    its absolute mean: it says the same of every place. One site alone has no deviation, so then none is.
    """
    check_share("saturated", share)
    if rows.shape[0] < 2:
        return torch.zeros(rows.shape[-1], dtype=torch.bool, device=rows.device)
    deviation, mean = torch.std_mean(rows.double(), dim=0, correction=0)
    return (deviation <= share * mean.abs()) & ~channels_near_zero(rows, dead)


def check_share(name: str, share: float) -> None:
    """Raise ValueError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {share!r}")


def _largest(rows: Tensor) -> Tensor:
    if not rows.shape[0]:
        return rows.new_zeros(rows.shape[-1], dtype=torch.float64)
    return rows.abs().amax(dim=0).double()
