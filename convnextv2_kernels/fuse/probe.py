"""A trial run: does a block that merely looks right compute what the fused block computes?"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import nn

from ..backends import use_backend
from .families import Family
from .forward import block_arguments, fused_block

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def computes_otherwise(block: nn.Module, family: Family) -> str | None:
    """Reason a copy of the block with small random parameters, in float64 on the CPU, disagrees with the fused
    block's specification; None if it agrees."""
    generator = torch.Generator().manual_seed(0)
    trial = _copy_with_new_parameters(block, generator).eval()
    x = torch.randn(2, family.parts(trial).conv.in_channels, 5, 4, dtype=torch.float64, generator=generator)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), use_backend("reference"):
            own = type(trial).forward(trial, x)
            fused = fused_block(x, *block_arguments(family, trial), save=None)
    except Exception as error:  # foreign code: whatever it raises means that it is something else
        return f"a trial run of its forward failed ({type(error).__name__}: {error})"
    if not isinstance(own, torch.Tensor) or own.shape != fused.shape or not torch.allclose(own, fused, 1e-9, 1e-12):
        return "a trial run of its forward gave other numbers than a ConvNeXt V2 block"
    return None


def _copy_with_new_parameters(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy that shares neither parameters nor hooks: the originals may be large, sharded or on the meta device.

    They are small, so that both eps matter: a block with another one is told apart.
    """
    memo: dict[int, object] = {}
    for parameter in block.parameters():
        new = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        memo[id(parameter)] = nn.Parameter(new * 1e-3, requires_grad=False)
    for module in block.modules():
        memo.update((id(getattr(module, table)), OrderedDict()) for table in _HOOK_TABLES)
    return copy.deepcopy(block, memo)

