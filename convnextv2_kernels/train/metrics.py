"""Top-k accuracy and mean loss over an evaluation, in counts that processes can add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.labelled import NO_LABEL


class TopK:
    """Count correct predictions and sum the cross entropy over batches; labels of -1 are left out.

    A k beyond the number of classes counts as that number. Nothing is read back from the device before
    :meth:`result`.

    Raises:
        ValueError: ``ks`` is empty or holds a number below 1.
    """

    def __init__(self, ks: Sequence[int] = (1, 5)):
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be numbers of at least 1, got {tuple(ks)}")
        self.ks = tuple(ks)
        self._counts = torch.zeros(len(self.ks) + 2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in ``logits [N, K]`` of any floating-point dtype and ``labels`` int64 ``[N]``."""
        counted = labels != NO_LABEL
        losses = F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="none")
        classes = logits.shape[1]
        best = logits.topk(min(max(self.ks), classes), dim=1).indices
        hits = best == labels[:, None]  # never where the label is -1
        sums = [hits[:, : min(k, classes)].sum() for k in self.ks] + [losses.double().sum(), counted.sum()]
        self._counts = self._counts.to(logits.device) + torch.stack([value.double() for value in sums])

    def counts(self) -> Tensor:
        """Return float64 ``[len(ks) + 2]``: correct for each k, sum of the losses, images. Processes add these up."""
        return self._counts.clone()

    def merge(self, counts: Tensor) -> TopK:
        """Add the counts of others to one's own; return self."""
        if counts.shape != self._counts.shape:
            raise ValueError(f"counts must have shape {tuple(self._counts.shape)}, got {tuple(counts.shape)}")
        self._counts = self._counts.to(counts.device) + counts.double()
        return self

    def result(self) -> dict[str, float]:
        """Return ``{"top1": percent, ..., "loss": mean, "images": number}``; NaN where no image was counted."""
        *correct, loss, images = self._counts.tolist()
        share = [value / images if images else float("nan") for value in (*correct, loss)]
        percents = {f"top{k}": 100 * value for k, value in zip(self.ks, share, strict=False)}
        return {**percents, "loss": share[-1], "images": int(images)}
