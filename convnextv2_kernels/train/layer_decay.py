"""Layer-wise learning-rate decay and weight decay of the official fine-tuning.

Source: ``optim_factory.py`` of the official repository; paper, appendix A.2 ("layer-wise" and, for Base and Large,
"group-wise" decay).
"""

from __future__ import annotations

from torch import nn

from .optim import is_undecayed

KINDS = ("single", "group")
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
    if kind not in KINDS:
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


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, kind: str = "single"
) -> list[dict]:
    """Return the optimiser's groups ``{"params", "weight_decay", "lr_scale", "name"}``.

    ``lr_scale`` is layer_decay^(last id - id), with the ids of :func:`layer_ids`. One group for each layer id and
    whether it is decayed, ids ascending, decayed first; with ``layer_decay`` 1, where ids make no difference, at most
    two groups, as in the official code. Weight decay spares what :func:`.optim.is_undecayed` says. Frozen parameters
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
