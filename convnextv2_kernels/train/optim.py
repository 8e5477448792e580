"""AdamW as ConvNeXt V2 uses it: parameter groups, the learning rate by step and by layer, the average of the weights.

Layer-wise decay: ``optim_factory.py`` of the official repository; paper, appendix A.2 ("layer-wise" and, for Base and
Large, "group-wise" decay).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .distributed import reshard

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
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
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


LAYER_DECAY_KINDS = ("single", "group")
GROUP_BLOCKS = 3  # blocks of the third stage that share a layer id in "group"


def layer_ids(model: nn.Module, kind: str = "single") -> dict[str, int]:
    """Return the layer id of each parameter of a :class:`convnextv2_kernels.models.ConvNeXtV2`, by name.

    "single": block b (0-based, counted through all stages) has id b + 1, a downsampling layer that of the block after
    it, so that the stem shares id 1 with the first block; norm and head come last, at one more than the blocks.

    "group": the stem 0; the first stage 1; the second stage, with the downsampling before it, 2; the third stage from 3
    on, three blocks to an id, the downsampling before it 3; the fourth stage and its downsampling the next id, norm and
    head one more. That is the official table for depths (3, 3, 27, 3), its last stage at 12. The official code has no
    other depths; here the ids of other depths have no gaps, so that the number of groups follows from depths[2].

    Raises:
        ValueError: ``kind`` is neither, or the model has a parameter with a name that is not official.
    """
    return {name: _layer_id(name, model.depths, kind) for name in _names(model, kind)}


def _names(model: nn.Module, kind: str) -> list[str]:
    if kind not in LAYER_DECAY_KINDS:
        raise ValueError(f"kind must be 'single' or 'group', got {kind!r}")
    if len(getattr(model, "depths", ())) != 4:
        raise ValueError(f"model must be a ConvNeXtV2 with depths of four stages, got {type(model).__name__}")
    return [name for name, _ in model.named_parameters()]


def last_layer_id(depths: tuple[int, ...], kind: str) -> int:
    """Return the id of norm and head, whose learning rate is not scaled."""
    return sum(depths) + 1 if kind == "single" else 4 + -(-depths[2] // GROUP_BLOCKS)


def _layer_id(name: str, depths: tuple[int, ...], kind: str) -> int:
    part, *rest = name.split(".")
    if part in ("norm", "head"):
        return last_layer_id(depths, kind)
    if part not in ("downsample_layers", "stages"):
        raise ValueError(
            f"model must have parameters in downsample_layers, stages, norm and head alone, as ConvNeXtV2 does, "
            f"but has {name!r}"
        )
    stage, block = int(rest[0]), int(rest[1]) if part == "stages" else 0
    if kind == "single":
        return sum(depths[:stage]) + block + 1
    if stage == 0:
        return 0 if part == "downsample_layers" else 1
    if stage == 1:
        return 2
    return 3 + block // GROUP_BLOCKS if stage == 2 else last_layer_id(depths, kind) - 1


def layer_decay_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, kind: str = "single"
) -> list[dict]:
    """Return the optimiser's groups ``{"params", "weight_decay", "lr_scale", "name"}``.

    ``lr_scale`` is layer_decay^(last id - id), with the ids of :func:`layer_ids`. One group for each layer id and
    whether it is decayed, ids ascending, decayed first; with ``layer_decay`` 1, where ids make no difference, at most
    two groups, as in the official code. Weight decay spares what :func:`is_undecayed` says. Frozen parameters
    are left out.

    Raises:
        ValueError: ``layer_decay`` is not in (0, 1], or see :func:`layer_ids`.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be greater than 0 and at most 1, got {layer_decay}")
    ids = layer_ids(model, kind)
    last = last_layer_id(model.depths, kind)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (ids[name] if layer_decay != 1 else last, is_undecayed(name, parameter))
            members.setdefault(key, []).append(parameter)
    return [
        {
            "params": members[layer, undecayed],
            "weight_decay": 0.0 if undecayed else weight_decay,
            "lr_scale": layer_decay ** (last - layer),
            "name": ("" if layer_decay == 1 else f"layer_{layer}_") + ("no_decay" if undecayed else "decay"),
        }
        for layer, undecayed in sorted(members)
    ]


class Average:
    """Moving average ``decay * average + (1 - decay) * parameter`` of every parameter, taken once a step.

    It holds tensors, not a copy of the module: FSDP2 does not let its modules be copied, and a shard is averaged where
    it lies.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the parameters as they are now into the average."""
        self._update(list(self.tensors.values()), [p.detach() for p in model.parameters()], None)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Let the average be the parameters as they are now."""
        for name, parameter in model.named_parameters():
            self.tensors[name].copy_(parameter)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the averages in the model's parameters, then put these back bit for bit."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        reshard(model)  # an evaluation leaves it gathered, and what is gathered would stay as it was
        for name, parameter in model.named_parameters():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)
