"""Mixup and CutMix by timm, with draws that are a function of the seed, and the loss that goes with them."""

from __future__ import annotations

from torch import Tensor, nn

from .augment import seeded_globals, timm
from .rng import MIX


class Mixing:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch with itself in reverse order.

    One draw for the whole batch, timm's mode "batch", as in the official fine-tuning.

    Args:
        mixup, cutmix: alpha of the Beta(alpha, alpha) distribution of the mixing weight; 0 turns it off.
        prob: probability that a batch is mixed.
        switch_prob: probability of CutMix where both are on.
        smoothing: label smoothing.
        num_classes: K.

    Attributes:
        active: whether either is on. If not, :meth:`mix` returns its arguments and timm is not needed.

    Raises:
        ValueError: an argument out of range. UserError: timm is not installed.
    """

    def __init__(
        self, mixup: float, cutmix: float, prob: float, switch_prob: float, smoothing: float, num_classes: int
    ):
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {value}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and less than 1, got {smoothing}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.smoothing, self.num_classes = smoothing, num_classes
        self.active = mixup > 0 or cutmix > 0
        self._mixup = None
        if self.active:
            self._mixup = timm().data.Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=prob,
                switch_prob=switch_prob,
                mode="batch",
                label_smoothing=smoothing,
                num_classes=num_classes,
            )

    def mix(self, images: Tensor, labels: Tensor, seed_counters: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """``images [N, C, H, W]``, ``labels`` int64 ``[N]`` -> mixed images and targets, float32 ``[N, K]``, smoothed.

        ``images`` are changed in place. The draws are a function of ``seed_counters``, (seed, counter, ...), see
        :data:`.rng.MIX`. Without mixing: the arguments as they are.

        Raises:
            ValueError: N is odd.
        """
        if not self.active:
            return images, labels
        if len(images) % 2:
            raise ValueError(f"images must be an even number to be mixed in pairs, got {len(images)}")
        seed, *counters = seed_counters
        with seeded_globals(seed, MIX, *counters):
            return self._mixup(images, labels)


def criterion(mixing: Mixing) -> nn.Module:
    """Return the loss of logits ``[N, K]`` and what :meth:`Mixing.mix` returns as targets: cross entropy, with label
    smoothing where the targets are plain labels, for mixed ones are smoothed already."""
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixing.active else mixing.smoothing)
