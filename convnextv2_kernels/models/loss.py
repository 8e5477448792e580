"""The FCMAE reconstruction loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import gemm_dtype
from ..ops._dispatch import once_differentiable, reference_forced


class _ReconstructionLoss(torch.autograd.Function):
    """Saves only the difference; autograd would also keep the target alive."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor) -> Tensor:
        difference = pred - target
        ctx.save_for_backward(difference.to(gemm_dtype(pred)))
        ctx.dtype = pred.dtype
        # At least 1: the mean over no patches at all is defined as 0.
        ctx.count = max(pred.numel(), 1)
        return difference.square().sum(dim=-1).sum() / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference.to(ctx.dtype) * (grad * (2.0 / ctx.count)).to(ctx.dtype), None


def reconstruction_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of hidden patches ``pred``, ``target [P, D]``; 0 if there are none.

    All patches have the same weight, whatever their image. The target is a constant. Computed in the
    wider of the two dtypes. One ``[P, D]`` tensor is saved for backward, in the dtype of GEMM
    operands, because only GEMMs consume its gradient.
    """
    if reference_forced():
        return (pred - target).square().sum(dim=-1).sum() / max(pred.numel(), 1)
    return _ReconstructionLoss.apply(pred, target)
