"""AdamW as ConvNeXt V2 uses it: parameter groups, the scaled learning rate and its schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

# Names of parameters that are scales, shifts or tokens whatever their number of axes:
# GRN's gamma and beta are stored as (1, 1, 1, 4C), the mask token as (1, D, 1, 1).
UNDECAYED_NAMES = ("bias", "gamma", "beta", "mask_token")
# standard: weights of convolutions and linear layers alone. official: what the official pre-training decays, which
# leaves out only tensors of one axis and biases, so that GRN's gamma and beta and the mask token shrink too.
DECAYS = ("standard", "official")


def is_undecayed(name: str, parameter: torch.Tensor, decay: str = "standard") -> bool:
    """Whether weight decay leaves a parameter alone under one of :data:`DECAYS`."""
    last = name.rpartition(".")[2]
    return parameter.ndim <= 1 or last == "bias" or (decay == "standard" and last in UNDECAYED_NAMES)


def parameter_groups(model: nn.Module, weight_decay: float, decay: str = "standard") -> list[dict]:
    """Split the trainable parameters into a decayed and an undecayed group for the optimiser.

    ``decay`` "standard": not decayed are tensors of at most one axis, biases, GRN's gamma and beta, the mask token;
    "official": see :data:`DECAYS`.
    """
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (undecayed if is_undecayed(name, parameter, decay) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: Iterable[dict], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return AdamW over parameter groups that carry their own weight decay and, if at all, an ``lr_scale``."""
    return torch.optim.AdamW(list(groups), lr=lr, betas=betas, fused=True)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return the learning rate of a batch size by the linear rule; ``base_lr`` is for 256."""
    return base_lr * batch_size / 256


def lr_at_step(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float = 0.0) -> float:
    """Return the learning rate of 0-based ``step``: linear warm-up from 0, then half a cosine to ``floor``.

    The official schedule, taken per step; as there, the first warm-up step has rate 0.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
