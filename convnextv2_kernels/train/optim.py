"""AdamW as FCMAE uses it: parameter groups, the scaled learning rate and its schedule."""

import math

import torch
from torch import nn

BETAS = (0.9, 0.95)
# Names of parameters that are scales, shifts or tokens whatever their number of axes:
# GRN's gamma and beta are stored as (1, 1, 1, 4C), the mask token as (1, D, 1, 1).
UNDECAYED_NAMES = ("bias", "gamma", "beta", "mask_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters into a decayed and an undecayed group for the optimiser.

    Not decayed: tensors of at most one axis, biases, GRN's gamma and beta, the mask token.
    """
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.rpartition(".")[2] in UNDECAYED_NAMES
        (undecayed if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with betas (0.9, 0.95) over :func:`parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=BETAS, fused=True)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return the learning rate of a batch size by the linear rule; ``base_lr`` is for 256."""
    return base_lr * batch_size / 256


def lr_at_step(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of 0-based ``step``: linear warm-up from 0, then half a cosine to 0.

    The official schedule, taken per step; as there, the first warm-up step has rate 0.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
