"""CUDA kernels with Triton's fused products: what ``auto`` serves the MLP and the block by where both are there.

Convolution, norms, copies and row passes are those of the CUDA backend."""

from __future__ import annotations

import functools

from . import base
from .cuda import primitives as _cuda
from .triton.fused import fused_backward, fused_forward, scaled_weight_grad

__all__ = ["fused_backward", "fused_forward"]  # beside everything the CUDA backend has


class Passes(_cuda.Passes):
    scaled_weight_grad = staticmethod(scaled_weight_grad)


gelu_grn_linear_backward = functools.partial(base.gelu_grn_linear_backward, Passes)


def __getattr__(name: str):
    return getattr(_cuda, name)
