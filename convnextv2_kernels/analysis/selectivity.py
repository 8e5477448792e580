"""Class selectivity index (Morcos et al. 2018; ConvNeXt V2 paper, Figure 7): how much one class drives a channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layout import PatchLayout
from .channels import rows_by_image
from .features import Tapped, check_taps, tapped

RECTIFY = {"relu": lambda x: x.clamp(min=0), "abs": torch.abs, "none": lambda x: x}


def class_selectivity_index(means: Tensor, eps: float = 0.0) -> Tensor:
    """``(mu_max - mu_other) / (mu_max + mu_other + eps)`` of each channel (Morcos et al. 2018, section 2).

    Args:
        means: ``[classes, C]``, mean activation of each channel for each class.
        eps: added to the denominator, in the unit of the activations. Morcos et al. have none.

    Returns:
        float64 ``[C]``. ``mu_max`` is the largest class mean, ``mu_other`` the mean of the other classes' means, each
        class with the same weight. In [0, 1] where no mean is negative: 0 for a channel that treats all classes alike,
        1 for one that only one class activates. A silent channel, 0 / 0, has 0. Means of both signs can give any
        number, and NaN where only the denominator is 0.

    Raises:
        ValueError: means of another shape, or of fewer than two classes; a negative eps.
    """
    if means.dim() != 2 or means.shape[0] < 2:
        raise ValueError(f"means must have shape [classes, C] with at least 2 classes, got {list(means.shape)}")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps!r}")
    means = means.double()
    largest = means.max(dim=0).values
    # From the differences: a channel that treats all classes alike gets exactly 0.
    difference = (largest - means).sum(dim=0) / (means.shape[0] - 1)
    denominator = 2 * largest - difference + eps
    ratio = difference / torch.where(denominator == 0, torch.nan, denominator)
    return torch.where((denominator == 0) & (difference == 0), 0.0, ratio)


class Density(NamedTuple):
    """Histogram as a density: ``edges [bins + 1]``, ``density [bins]`` of integral 1 over the values inside, and the
    share of values ``outside`` the edges (or NaN)."""

    edges: np.ndarray
    density: np.ndarray
    outside: float


def selectivity_density(values: Tensor, bins: int = 50, low: float = 0.0, high: float = 1.0) -> Density:
    """Density of a layer's indices between ``low`` and ``high``, as Figure 7 shows them; zero where all are outside."""
    numbers = values.detach().cpu().double().numpy()
    inside = numbers[(numbers >= low) & (numbers <= high)]  # NaN is not
    counts, edges = np.histogram(inside, bins=bins, range=(low, high))
    density = counts / (max(1, inside.size) * np.diff(edges))
    return Density(edges, density, 1 - inside.size / numbers.size if numbers.size else 0.0)


@dataclass(frozen=True)
class LayerSelectivity:
    """One layer: ``index_of_unit`` float64 ``[C]``, see :func:`class_selectivity_index`. ``silent``: share of
    channels whose class means are all 0. ``classes``, ``images``: how many counted."""

    name: str
    stage: int
    index: int
    index_of_unit: Tensor
    silent: float
    classes: int
    images: int

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile over the channels, without NaN."""
        values = self.index_of_unit[~self.index_of_unit.isnan()].numpy()
        return tuple(np.quantile(values, (0.25, 0.5, 0.75)).tolist()) if values.size else (float("nan"),) * 3


class ClassSelectivity:
    """Collects the class means of every layer over batches: one float64 sum per class and channel.

    An image's activation of a channel is the mean of its map over the (visible) sites. The paper reads the output of
    every residual block, which is signed, and does not say how it is rectified; Morcos et al. read ReLUs. So the map is
    rectified before the mean: ``relu`` (default) and ``abs`` keep the index in [0, 1], ``none`` does not.

    Args:
        num_classes: labels are 0 to num_classes - 1. Classes without images do not count.
        rectify: "relu", "abs" or "none".
    """

    def __init__(self, num_classes: int, rectify: str = "relu"):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes!r}")
        if rectify not in RECTIFY:
            raise ValueError(f"rectify must be one of {', '.join(RECTIFY)}, got {rectify!r}")
        self.num_classes, self.rectify = num_classes, rectify
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, int]] = {}

    def update(self, layer: Tapped, labels: Tensor, layout: PatchLayout | None = None) -> None:
        """Add the images of one layer's features; ``labels [N]`` int64. Images without visible sites do not count."""
        labels = labels.cpu()
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        rectify = RECTIFY[self.rectify]
        rows = list(rows_by_image(layer.features, layout))
        if len(rows) != labels.numel():
            raise ValueError(f"labels must have one entry per image, {len(rows)} in all, got {list(labels.shape)}")
        seen = torch.tensor([image.shape[0] > 0 for image in rows], dtype=torch.bool)
        channels = layer.features.shape[-1]
        empty = layer.features.new_empty(0, channels, dtype=torch.float64)
        means = [rectify(image).mean(dim=0, dtype=torch.float64)[None] for image in rows if image.shape[0]]
        means = torch.cat([empty, *means]).cpu()
        if not torch.isfinite(means).all():
            raise ValueError(f"{layer.name} ({layer.tap}): features must be finite, got NaN or infinity")
        if layer.name not in self._sums:
            self._places[layer.name] = (layer.stage, layer.index)
            self._sums[layer.name] = torch.zeros(self.num_classes, channels, dtype=torch.float64)
            self._counts[layer.name] = torch.zeros(self.num_classes, dtype=torch.int64)
        self._sums[layer.name].index_add_(0, labels[seen], means)
        self._counts[layer.name] += torch.bincount(labels[seen], minlength=self.num_classes)

    def merge(self, other: ClassSelectivity) -> None:
        """Add what another one has collected, such as of another part of the images."""
        if (other.num_classes, other.rectify) != (self.num_classes, self.rectify):
            raise ValueError(
                f"other must have num_classes {self.num_classes} and rectify {self.rectify!r}, got "
                f"{other.num_classes} and {other.rectify!r}"
            )
        for name, sums in other._sums.items():
            self._places[name] = other._places[name]
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums.clone()
            counts = other._counts[name]
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts.clone()

    def class_means(self, name: str) -> Tensor:
        """float64 ``[classes with images, C]`` of one layer."""
        has_images = self._counts[name] > 0
        return self._sums[name][has_images] / self._counts[name][has_images, None]

    def result(self, eps: float = 0.0) -> list[LayerSelectivity]:
        """Of each layer, from the first to the last.

        Raises:
            ValueError: images of fewer than two classes.
        """
        layers = []
        for name, (stage, index) in sorted(self._places.items(), key=lambda item: item[1][1]):
            means = self.class_means(name)
            silent = (means == 0).all(dim=0).double().mean().item()
            values = class_selectivity_index(means, eps)
            images = int(self._counts[name].sum())
            layers.append(LayerSelectivity(name, stage, index, values, silent, means.shape[0], images))
        return layers


def selectivity_by_layer(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    tap: str = "block",
    rectify: str = "relu",
    eps: float = 0.0,
) -> list[LayerSelectivity]:
    """Figure 7 of one model: the index of every channel of every block's output.

    ``batches`` of (normalised images ``[N, 3, H, W]`` on the model's device, labels ``[N]`` int64); ``tap``: see
    :data:`.features.TAPS`.
    """
    check_taps([tap], "tap")
    collected = ClassSelectivity(num_classes, rectify)
    for images, labels in batches:
        for layer in tapped(model, images, taps=(tap,)):
            collected.update(layer, labels)
    return collected.result(eps)
