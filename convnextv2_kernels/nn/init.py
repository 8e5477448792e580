"""Parameter initialisation of ConvNeXt V2."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class LinearMap(Protocol):
    """A layer with a weight, and a bias or None."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


def init_linear_map(module: LinearMap) -> None:
    """Weights of a convolution or linear layer ~ N(0, 0.02^2) truncated at +-2, bias 0.

    As in the official code the bounds are absolute, not in units of the standard deviation, so they
    never matter.
    """
    nn.init.trunc_normal_(module.weight, std=0.02, a=-2.0, b=2.0)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
