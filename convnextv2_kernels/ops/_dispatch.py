"""The rule every op's backward follows: it can run once, and says so instead of returning a wrong second derivative."""

from __future__ import annotations

import functools

import torch


def once_differentiable(backward):
    """Marks ``backward(ctx, *grads)`` as not differentiable itself.

    PyTorch's decorator of this name stays silent where the incoming gradient is a constant, so that
    ``create_graph=True`` gives a gradient without a graph; this one raises.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *grads):
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(ctx).__name__.removeprefix('_')} can be differentiated once only, got create_graph=True; run "
                "the forward pass under convnextv2_kernels.use_backend('reference') for higher derivatives"
            )
        return backward(ctx, *grads)

    return wrapped
