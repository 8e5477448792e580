"""Result files: CSV for numbers, JSON for numbers with all that produced them."""

from __future__ import annotations

import csv
import datetime
import io
import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import backends
from .._files import atomic_file, write_json
from ..version import __version__


def versions() -> dict[str, str]:
    """What may change the last digits of a result."""
    return {
        "convnextv2_kernels": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": backends.forced(),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as CSV, atomically; NaN is an empty field, bytes that are no UTF-8 are escapes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if plain(value) is None else value for name, value in row.items()} for row in rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))  # of names that are no UTF-8


def write_result(path: Path, analysis: str, settings: Mapping[str, Any], networks: Sequence[Any], results: Any) -> None:
    """Write a result as JSON, atomically: the settings, the networks, the software, and ``results``; NaN is null."""
    record = {
        "analysis": analysis,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "networks": [{"label": network.label, **network.about} for network in networks],
        "versions": versions(),
        "results": results,
    }
    write_json(path, plain(record))


def plain(value: Any) -> Any:
    """``value`` in types that JSON has; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def file_name(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^\w.=-]+", "-", text).strip("-.")[:100] or "network"
