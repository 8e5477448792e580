"""What a run writes step by step: log.jsonl, metrics.jsonl and scalars for TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import atomic_file
from ..errors import UserError


class StepLog:
    """Append one JSON object a step to a file.

    Opened for a run that has done ``step`` steps, it first drops the lines of later steps (and
    a last line cut short by a kill): a resumed run writes them again. The file is made by the first line.
    """

    def __init__(self, path: Path, step: int):
        self._path, self._file = path, None
        if path.exists():
            valid = []
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, KeyError, TypeError):
                    break
                valid.append(line)
            with atomic_file(path) as file:
                file.writelines(valid)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line and hand it to the operating system."""
        if self._file is None:
            self._file = self._path.open("ab")
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the lines to disk: before a checkpoint, so that the log never lags behind one."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Board:
    """Write scalars to ``folder``, one point a step; without a folder, write nothing.

    Opened for a run that has done ``step`` steps; points of later steps that an interrupted run left are hidden.
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
