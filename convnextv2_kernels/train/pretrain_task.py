"""FCMAE pre-training as a task of the loop."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import Batch, CropDataset, collate, normalize
from ..data.rng import MASK, torch_stream
from ..layout import random_mask
from ..models import FCMAE
from .config import PretrainConfig
from .optim import parameter_groups
from .task import Span
from .trainer import Trainer


class PretrainTask:
    """Predict the hidden patches of random crops, under masks that are a function of (seed, step, image)."""

    def __init__(self, model: FCMAE, dataset: CropDataset, config: PretrainConfig):
        self.model, self.dataset, self.config = model, dataset, config
        self.collate = collate
        self._mask: tuple[int, Tensor] | None = None

    def parameter_groups(self) -> list[dict]:
        """Decayed or not, as the config says."""
        return parameter_groups(self.model, self.config.weight_decay, self.config.decay)

    def placeholder(self, count: int) -> Batch:
        """Black crops."""
        return Batch(torch.zeros(count, *self.config.img_size, 3, dtype=torch.uint8), [])

    def loss(self, network: nn.Module, batch: Batch, first: int, span: Span) -> Tensor:
        """Reconstruction loss of ``span``."""
        device = next(self.model.parameters()).device
        pixels = batch.images[first : first + span.end - span.begin].to(device, non_blocking=True)
        if self._mask is None or self._mask[0] != span.step:
            self._mask = span.step, draw_mask(self.config, self.config.batch_size, span.step)
        mask = self._mask[1][span.begin : span.end].to(device)
        loss, _, _ = network(normalize(pixels).to(self.config.dtype), mask)
        return loss

    def epoch_done(self, trainer: Trainer, epoch: int) -> None:
        """Nothing to do: the log has the losses."""

    def state(self) -> dict[str, Any]:
        """Nothing to remember: masks and crops are functions of the step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing was remembered."""


def draw_mask(config: PretrainConfig, num_images: int, step: int) -> Tensor:
    """Return the mask [N, Gh, Gw] of a 0-based step, True = hidden: a function of (seed, step)."""
    generator = torch_stream(config.seed, MASK, step)
    return random_mask(num_images, config.grid, ratio=config.mask_ratio, generator=generator)
