"""The arms of the FCMAE step: ours and the masked dense variants, all with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..layout import random_mask
from ..models import create_fcmae
from .baseline import PATCH, MaskedDenseFCMAE, Variant

SPARSE = "sparse"
MASK_RATIO = 0.6  # share of the patches that is hidden, the paper's


@dataclass
class Arm:
    """One way to compute the step: ``run(images, mask)`` returns (loss, prediction)."""

    name: str
    model: nn.Module
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    variant: Variant | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and prediction, under autocast of the batch's device where the batch asks for it."""
        with torch.autocast(batch.images.device.type, batch.dtype, enabled=batch.autocast):
            return self.run(batch.images, batch.mask)

    def step(self, batch: Batch) -> None:
        """Forward, backward, gradients dropped; no optimizer."""
        loss, _ = self.forward(batch)
        loss.backward()
        self.model.zero_grad(set_to_none=True)


@dataclass
class Batch:
    """Images [N, C, H, W], mask [N, Gh, Gw] bool (True = hidden) and the compute dtype."""

    images: Tensor
    mask: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def autocast(self) -> bool:
        return self.dtype != self.images.dtype

    def head(self, count: int) -> Batch:
        """The first ``count`` images."""
        return Batch(self.images[:count], self.mask[:count], self.dtype)

    def to_float64(self) -> Batch:
        """The same batch, computed in float64."""
        return Batch(self.images.double(), self.mask, torch.float64)


def make_batch(
    size: int,
    img_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    mask_ratio: float = MASK_RATIO,
) -> Batch:
    """Random images and FCMAE masks (19 of 49 patches visible at 224 px and the paper's ratio).

    They are drawn on the CPU, so that one seed means the same batch on every device.
    """
    if size < 1:
        raise ValueError(f"batch size is {size}, expected at least 1")
    if img_size < PATCH or img_size % PATCH:
        raise ValueError(f"img_size is {img_size}, expected a positive multiple of {PATCH}")
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, img_size, img_size, generator=generator)
    side = img_size // PATCH
    mask = random_mask(size, (side, side), mask_ratio, generator=generator)
    return Batch(images.to(device), mask.to(device), dtype)


def make_sparse(model_name: str, seed: int, device: str = "cpu") -> Arm:
    """Our FCMAE with random weights.

    GRN starts at zero in training, which would hide half of its backward pass from the correctness
    gate, so vectors (biases, norms, GRN) are drawn around their initial values.
    """
    model = create_fcmae(model_name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == max(parameter.shape):
                parameter.add_(noise, alpha=0.2)
            else:
                parameter.copy_(noise.mul_(0.02))
    model.to(device)

    def run(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss, pred, _ = model(images, mask)
        return loss, pred

    return Arm(SPARSE, model, run)


def served_by(sparse: Arm, backend: str) -> Arm:
    """The sparse arm computed by one backend; the model is the same object."""

    def run(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend(backend):
            return sparse.run(images, mask)

    return Arm(f"{SPARSE} {backend}", sparse.model, run)


def make_dense(sparse: Arm, variants: Sequence[Variant]) -> list[Arm]:
    """Masked dense arms with the weights of the sparse one; nothing is compiled before it runs.

    Weights are the sparse arm's own tensors, but for convolutions whose memory format differs.
    """
    state = sparse.model.state_dict()
    models: dict[tuple[str, str], MaskedDenseFCMAE] = {}
    arms = []
    for variant in variants:
        key = (variant.layout, variant.pointwise)
        if key not in models:
            models[key] = MaskedDenseFCMAE.from_state_dict(state, variant=variant)
        model = models[key]
        run = torch.compile(model, fullgraph=True, dynamic=False) if variant.compiled else model
        arms.append(Arm(variant.name, model, run, variant))
    return arms


def make_truth(sparse: Arm) -> Arm:
    """The masked dense network in float64."""
    # A tensor of its own also where the model is in float64 already: its gradients are dropped.
    state = {key: value.to(torch.float64, copy=True) for key, value in sparse.model.state_dict().items()}
    model = MaskedDenseFCMAE.from_state_dict(state)
    return Arm("float64", model, model)
