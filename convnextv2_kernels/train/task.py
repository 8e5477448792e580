"""What the loop asks of a task: pre-training or fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

from .config import RunConfig

if TYPE_CHECKING:
    from .trainer import Trainer


class Span(NamedTuple):
    """Images ``begin`` to ``end`` of the batch of 0-based ``step``, as all processes together see it."""

    step: int
    begin: int
    end: int


class Task(Protocol):
    """A model, its data and its loss. The loop knows nothing else of what is trained.

    ``dataset`` is addressed by (epoch, index); ``collate`` makes of its samples a batch with ``images`` (None where
    they could not be read) and ``failures``. Everything random is a function of the seed and a :class:`Span`, never of
    how the batch is split.
    """

    config: RunConfig
    model: nn.Module
    dataset: Dataset
    collate: Callable[[list[Any]], Any]

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimiser, with their weight decay."""

    def placeholder(self, count: int) -> Any:
        """A batch of ``count`` blank images, which stands in where images could not be read."""

    def loss(self, network: nn.Module, batch: Any, first: int, span: Span) -> Tensor:
        """Mean loss of the images ``span`` of a step, which are ``batch``'s from ``first`` on. ``network`` is the model
        as it is spread over processes."""

    def epoch_done(self, trainer: Trainer, epoch: int) -> None:
        """Called in all processes after the last step of a 0-based epoch, before its checkpoint."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember of the task."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` returned."""
