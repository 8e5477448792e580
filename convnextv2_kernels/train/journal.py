"""log.jsonl: one line a step, and only the lines of one run."""

import json
import os
from pathlib import Path
from typing import Any

from ..files import atomic_file


class StepLog:
    """Append one JSON object a step to a file.

    Opened for a run that stands after ``step`` steps, it first drops the lines of later steps (and
    a last line cut short by a kill): a resumed run writes them again.
    """

    def __init__(self, path: Path, step: int):
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, KeyError, TypeError):
                    break
                kept.append(line)
        with atomic_file(path) as file:
            file.writelines(kept)
        self._file = open(path, "ab")

    def write(self, record: dict[str, Any]) -> None:
        """Append a line and hand it to the operating system."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the lines to disk: before a checkpoint, so that the log never lags behind one."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
