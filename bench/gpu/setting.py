"""What every stage is told: where to write, until when, on which device, and whether it is a dry run."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import ROOT


@dataclass(frozen=True)
class Setting:
    """Passed to each stage's process as JSON.

    Attributes:
        out: folder of results.json and the logs.
        deadline: seconds since the epoch at which the stage has to be done.
        dry_run: emulated kernels on a CPU, tiny shapes, one repetition: the times mean nothing.
        backend: of :mod:`convnextv2_kernels`, "cuda" but in tests of this program.
    """

    out: str
    deadline: float
    dry_run: bool = False
    backend: str = "cuda"

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def remaining(self) -> float:
        """Seconds left."""
        return self.deadline - time.time()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        return cls(**json.loads(text))

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a subprocess that finds this package, the library and the tests' helpers."""
        paths = [str(ROOT), str(ROOT / "python_tests"), os.environ.get("PYTHONPATH", "")]
        fixed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if self.dry_run:
            fixed["OMP_NUM_THREADS"] = "1"  # emulated kernels run on one thread; others would only wait for it
        return {**os.environ, **fixed, **more}


class Skip(Exception):
    """Raised by a stage or a case that cannot run here; the text says why."""


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The kind of an exception and the first line of its message."""
    if isinstance(error, BaseException):
        lines = str(error).strip().splitlines() or [""]
        error = f"{type(error).__name__}: {lines[0]}"
    return error[:limit]


def significant(value: Any, digits: int = 4) -> Any:
    """The value with floats shortened to some digits, so that the JSON stays small."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: significant(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [significant(item, digits) for item in value]
    return value
