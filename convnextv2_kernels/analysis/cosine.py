"""Feature cosine distance (ConvNeXt V2 paper, section 4, Figure 4): how much the channels of a layer differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layout import PatchLayout
from .channels import DEAD, channels_near_zero, rows_by_image
from .features import Tapped, check_taps, tapped


class CosineDistance(NamedTuple):
    """Per image, float64 ``[N]`` on the CPU: ``all`` channels, ``live`` channels only, and the ``dead`` share 0..1."""

    all: Tensor
    live: Tensor
    dead: Tensor


@torch.no_grad()
def feature_cosine_distance(features: Tensor, layout: PatchLayout | None = None, dead: float = DEAD) -> CosineDistance:
    """Mean pairwise cosine distance of the channels of each image.

    With ``X_i`` channel i over the sites of an image, ``(1 / C^2) sum_ij (1 - cos(X_i, X_j)) / 2`` (paper section 4),
    the diagonal i = j included. With unit vectors ``u_i = X_i / |X_i|`` the sum of all cosines is ``|sum_i u_i|^2``, so
    the distance is ``(1 - |sum_i u_i|^2 / C^2) / 2`` in O(sites * C). Its range is [0, 0.5]: 0 where all channels
    are the same up to a positive factor, 0.5 where the unit vectors cancel.

    The cosine of a channel that is zero everywhere is undefined, and the paper is silent. Here it is 0 with all others
    and with itself, as :func:`torch.nn.functional.cosine_similarity` has it. So such a channel counts as *different*
    from all others; ``dead`` and ``live`` show where that, and not diversity, makes the number large.

    Args:
        features: ``[N, H, W, C]``, or packed ``[P, s, s, C]`` with a layout: then the visible sites count.
        dead: a channel is dead, and not live, up to this share of the layer's root mean square, see
            :func:`.channels.channels_near_zero`.

    Returns:
        ``all``: over all channels. ``live``: over the channels that are not dead, NaN where there are none. ``dead``:
        share of dead channels. NaN for an image without visible sites. Computed in float64.

    Raises:
        ValueError: features of another shape, or with values that are not finite.
    """
    found = []
    for rows in rows_by_image(features, layout):
        if not torch.isfinite(rows).all():
            raise ValueError("features must be finite, got NaN or infinity")
        if not rows.numel():
            found.append((torch.nan, torch.nan, torch.nan))
            continue
        rows = rows.double()
        is_dead = channels_near_zero(rows, dead)
        # Scaled by the largest value first, so that the squares of tiny features do not vanish.
        largest = rows.abs().amax(dim=0)
        scaled = rows / torch.where(largest > 0, largest, 1.0)
        norm = scaled.square().sum(dim=0).sqrt()
        inverse = torch.where(norm > 0, norm, 1.0).reciprocal()
        live = int((~is_dead).sum())
        found.append(
            (
                _distance(scaled @ inverse, rows.shape[1]),
                _distance(scaled @ (inverse * ~is_dead), live) if live else torch.nan,
                1 - live / rows.shape[1],
            )
        )
    return CosineDistance(*torch.tensor(found, dtype=torch.float64).reshape(-1, 3).unbind(1))


def _distance(sum_of_units: Tensor, channels: int) -> float:
    return max(0.0, (1 - sum_of_units.square().sum().item() / channels**2) / 2)


@dataclass
class Moments:
    """Count, mean and sample deviation of values that come in parts; NaN is left out."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values[~values.isnan()].double()
        self.count += values.numel()
        self.total += values.sum().item()
        self.squares += values.square().sum().item()

    def merge(self, other: Moments) -> None:
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")

    @property
    def std(self) -> float:
        if self.count < 2:
            return float("nan")
        return (max(0.0, self.squares - self.total**2 / self.count) / (self.count - 1)) ** 0.5


@dataclass(frozen=True)
class LayerCosine:
    """One layer's distances over the images.

    ``position``: the paper's normalised layer index, 0 for the first block and 1 for the last. ``mean``, ``std``: of
    the distance over all channels, in [0, 0.5]; ``std`` is the sample deviation over images. ``live_mean``: over the
    live channels. ``dead_share``: mean share of dead channels, 0..1. ``images``: how many counted.
    """

    name: str
    stage: int
    index: int
    position: float
    channels: int
    mean: float
    std: float
    live_mean: float
    dead_share: float
    images: int


@dataclass
class CosineByLayer:
    """Collects :func:`feature_cosine_distance` over batches, a few numbers per layer."""

    dead: float = DEAD
    _layers: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _moments: dict[str, tuple[Moments, Moments, Moments]] = field(default_factory=dict)

    def update(self, layer: Tapped, layout: PatchLayout | None = None) -> None:
        """Add the images of one layer's features."""
        try:
            distances = feature_cosine_distance(layer.features, layout, self.dead)
        except ValueError as error:
            raise ValueError(f"{layer.name} ({layer.tap}): {error}") from None
        self._layers[layer.name] = (layer.stage, layer.index, layer.features.shape[-1])
        moments = self._moments.setdefault(layer.name, (Moments(), Moments(), Moments()))
        for moment, values in zip(moments, distances, strict=True):
            moment.add(values)

    def merge(self, other: CosineByLayer) -> None:
        """Add what another one has collected, such as of another part of the images."""
        self._layers.update(other._layers)
        for name, theirs in other._moments.items():
            ours = self._moments.setdefault(name, (Moments(), Moments(), Moments()))
            for moment, part in zip(ours, theirs, strict=True):
                moment.merge(part)

    def result(self) -> list[LayerCosine]:
        """Of each layer, from the first to the last."""
        last = max((index for _, index, _ in self._layers.values()), default=0)
        rows = []
        for name, (stage, index, channels) in sorted(self._layers.items(), key=lambda item: item[1][1]):
            distance, live, dead = self._moments[name]
            position = index / last if last else 0.0
            numbers = (distance.mean, distance.std, live.mean, dead.mean, distance.count)
            rows.append(LayerCosine(name, stage, index, position, channels, *numbers))
        return rows


def cosine_by_layer(
    model: nn.Module, batches: Iterable[Tensor], tap: str = "grn", dead: float = DEAD
) -> list[LayerCosine]:
    """Figure 4's curve of one model: its layers' distances, averaged over images.

    ``batches`` of normalised ``[N, 3, H, W]`` on the model's device; ``tap``: see :data:`.features.TAPS`. The
    paper reads the layers that expand the width to 4C, over 1000 validation images of different classes.
    """
    check_taps([tap], "tap")
    collected = CosineByLayer(dead)
    for images in batches:
        for layer in tapped(model, images, taps=(tap,)):
            collected.update(layer)
    return collected.result()
