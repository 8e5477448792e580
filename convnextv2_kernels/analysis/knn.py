"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, Instance Discrimination, 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIMILARITIES = 1 << 26  # held at once: 256 MiB of float32
TOP = 5


@dataclass(frozen=True)
class KNNResult:
    """Top-1 and top-5 accuracy in percent over ``images``, the ``k`` used, and a ``note`` where it is not the one asked
    for."""

    top1: float
    top5: float
    images: int
    k: int
    note: str | None = None


def knn_votes(
    train_features: Tensor, train_labels: Tensor, features: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Return votes, float64 ``[Q, num_classes]``: over the k training rows of largest cosine similarity s, the sum of
    exp((s - s_max) / temperature) of each class; s_max, the largest s of a query, keeps exp from overflowing."""
    similarity = F.normalize(features.float(), dim=1) @ train_features.T
    best, index = similarity.topk(k, dim=1)
    best = best.double()
    weights = ((best - best[:, :1]) / temperature).exp()
    votes = torch.zeros(len(features), num_classes, dtype=torch.float64, device=features.device)
    return votes.scatter_add_(1, train_labels[index], weights)


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> KNNResult:
    """Classify ``features [Q, D]`` by their neighbours in ``train_features [N, D]``; labels are int64 ``[Q]``, ``[N]``.

    Queries are taken ``chunk`` at a time, by default as many as keep the similarities at 256 MiB. In the top 5 are
    only classes that a neighbour voted for. A ``k`` above N is N, with a note. All tensors on one device.

    Raises:
        ValueError: empty or mismatched features and labels, a negative label, or ``k``, ``temperature`` or ``chunk``
            out of range.
    """
    check_labelled_features(train_features, train_labels, features, labels)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    size = len(train_features)
    used = min(k, size)
    note = f"k = {k} is more than the {size} training images; k = {used} was used" if used < k else None
    classes = int(max(train_labels.max(), labels.max())) + 1
    normed = F.normalize(train_features.float(), dim=1)
    correct = torch.zeros(2, dtype=torch.int64, device=features.device)
    step = chunk or max(1, SIMILARITIES // size)
    for begin in range(0, len(features), step):
        part = slice(begin, begin + step)
        votes = knn_votes(normed, train_labels, features[part], classes, used, temperature)
        most, best = votes.topk(min(TOP, classes), dim=1)
        hits = (best == labels[part, None]) & (most > 0)
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
    top1, top5 = (100 * value / len(features) for value in correct.tolist())
    return KNNResult(top1, top5, len(features), used, note)


def check_labelled_features(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless both are ``[*, D]`` features of the same D with one label >= 0 each, and not empty."""
    pairs = {"train_": (train_features, train_labels), "": (features, labels)}
    for name, (rows, numbers) in pairs.items():
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(f"{name}features must be [N, D] with N at least 1, got shape {tuple(rows.shape)}")
        if numbers.shape != rows.shape[:1]:
            raise ValueError(f"{name}labels must be one for each of {len(rows)} rows, got shape {tuple(numbers.shape)}")
        if numbers.min() < 0:
            raise ValueError(f"{name}labels must be at least 0, got {int(numbers.min())}")
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"features must be as wide as train_features, {train_features.shape[1]}, got {features.shape[1]}"
        )
