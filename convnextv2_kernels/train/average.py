"""The exponential moving average of a model's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .distributed import reshard


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
        reshard(model)  # an evaluation leaves it gathered, and what is gathered would go on as it was
        for name, parameter in model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
