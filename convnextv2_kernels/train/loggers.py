"""log.jsonl and metrics.jsonl: one line a step or an evaluation, and only the lines of one run."""

import json
import os
from pathlib import Path
from typing import Any

from .._atomic_io import atomic_file


class StepLog:
    """Append one JSON object a step to a file.

    Opened for a run that stands after ``step`` steps, it first drops the lines of later steps (and
    a last line cut short by a kill): a resumed run writes them again. The file is made by the first line.
    """

    def __init__(self, path: Path, step: int):
        self._path, self._file = path, None
        if path.exists():
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, KeyError, TypeError):
                    break
                kept.append(line)
            with atomic_file(path) as file:
                file.writelines(kept)

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
