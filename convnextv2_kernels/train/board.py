"""Scalars for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError


class Board:
    """Write scalars to ``folder``, one point a step; without a folder, write nothing.

    Opened for a run that stands after ``step`` steps, points of later steps that an interrupted run left are hidden.
    """

    def __init__(self, folder: Path | None, step: int):
        self._writer = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard.") from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step, by name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
