"""A trial run: does a block with the right names compute the same as the fused block?"""

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
    """Reason the block is not what its names suggest: it has further parameters, or a copy of it with small random
    parameters, in float64 on the CPU, disagrees with the fused block's specification. None if it agrees."""
    parts = family.parts(block)
    known = sum(len(list(part.parameters())) for _, part in family.bypassed(block))
    if known != len(list(block.parameters())) or list(block.buffers()):
        return "it has parameters or buffers besides those of a ConvNeXt V2 block"
    generator = torch.Generator().manual_seed(0)
    trial = _copy_with_new_parameters(block, generator)
    x = torch.randn(2, parts.conv.in_channels, 5, 4, dtype=torch.float64, generator=generator)
    for training in (False, True):
        trial.train(training)
        family.parts(trial).drop_path.eval()
        with (
            torch.autocast("cpu", enabled=False),
            torch.no_grad(),
            torch.random.fork_rng(devices=()),
            use_backend("reference"),
        ):
            try:
                own = type(trial).forward(trial, x)
            except Exception as error:  # foreign code: any exception means that it is another kind of block
                return f"a trial run of its forward failed ({type(error).__name__}: {error})"
            fused = fused_block(x, *block_arguments(family, trial), save=None)
        if not isinstance(own, torch.Tensor) or own.shape != fused.shape or not torch.allclose(own, fused, 1e-9, 1e-12):
            return "a trial run of its forward gave other numbers than a ConvNeXt V2 block"
    return None


def _copy_with_new_parameters(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy that shares neither parameters nor hooks: the originals may be large, sharded or on the meta device.

    The parameters are small, so that both eps matter and a block with another eps is recognised.
    """
    memo: dict[int, object] = {}
    for parameter in block.parameters():
        new = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        memo[id(parameter)] = nn.Parameter(new * 1e-3, requires_grad=False)
    for module in block.modules():
        memo.update((id(getattr(module, table)), OrderedDict()) for table in _HOOK_TABLES)
    return copy.deepcopy(block, memo)
