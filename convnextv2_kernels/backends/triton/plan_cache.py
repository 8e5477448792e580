"""Plans measured on this machine, on disk: written by ``python -m convnextv2_kernels tune``, read by ``plans.py``.

One file per GPU, driver, and versions of PyTorch, Triton and this library, in ``CONVNEXTV2_KERNELS_CACHE`` or
``~/.cache/convnextv2_kernels``: after any of them changes, the committed table serves until tuned again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from ..._atomic_io import write_json
from ...version import __version__
from . import INTERPRETED, version
from .plans import KERNELS, Plan, Shape, forget, plan_of


def directory() -> Path:
    """Folder of the measured plans."""
    given = os.environ.get("CONVNEXTV2_KERNELS_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "convnextv2_kernels"


@functools.lru_cache
def machine(index: int | None = None) -> dict[str, str]:
    """What a measurement holds for."""
    versions = {"torch": torch.__version__, "triton": version(), "library": __version__}
    if INTERPRETED:
        return {"gpu": "Triton's interpreter", "driver": "none", **versions}
    return {"gpu": torch.cuda.get_device_name(index), "driver": _driver(), **versions}


def _driver() -> str:
    """Version of the GPU driver; where the system does not tell, of the newest CUDA it knows, or of ROCm."""
    try:
        return re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())[0]
    except (OSError, TypeError):
        return torch.version.hip or f"CUDA {torch._C._cuda_getDriverVersion()}"


def path(index: int | None = None) -> Path:
    """File of the plans measured for a GPU, by default the current one."""
    key = machine(index)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(c if c.isalnum() else "-" for c in key["gpu"].lower())
    return directory() / f"plans-{name}-{digest}.json"


def _key(shape: Shape) -> tuple:
    """Shapes with the same key share a plan: the same widths, and rows of an image to a factor of two."""
    dtype = str(shape.dtype).removeprefix("torch.")
    return dtype, shape.width, shape.hidden, shape.out, shape.rows_each.bit_length()


@functools.lru_cache
def _read(file: Path) -> dict[tuple, Plan]:
    try:
        rows = json.loads(file.read_text())["plans"]
        return {tuple(row["key"]): plan_of(row, row["source"]) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"measured plans in {file} cannot be read ({error}); the built-in table is used", stacklevel=2)
        return {}


def measured(shape: Shape, index: int | None = None) -> Plan | None:
    """The plan measured for a shape on a GPU, or None."""
    return _read(path(index)).get(_key(shape))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time, where the system has file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(plans: dict[Shape, Plan], index: int | None = None) -> Path:
    """Adds plans to those measured before; other processes that run already keep what they have read."""
    file = path(index)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.parent):
        _read.cache_clear()
        merged = dict(_read(file)) | {_key(shape): plan for shape, plan in plans.items()}
        rows = [
            {"key": list(key), "source": plan.source}
            | {name: list(tile) for name in KERNELS if (tile := getattr(plan, name)) is not None}
            for key, plan in sorted(merged.items())
        ]
        write_json(file, {"machine": machine(index), "plans": rows})
    _read.cache_clear()
    forget()
    return file
