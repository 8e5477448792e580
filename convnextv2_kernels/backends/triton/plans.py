"""Which of the MLP's GEMMs are fused with the element-wise work around them, and the shape of their tiles.

Measurements by ``python -m convnextv2_kernels tune`` on this machine take precedence over the committed table
``plans.json``, a list per GPU family whose first matching row applies. Training steps never measure.
``CONVNEXTV2_KERNELS_TRITON_PRODUCTS`` = ``library`` or ``fused`` overrides both.

Measured plans are on disk, one file per GPU, driver, and versions of PyTorch, Triton and this library, in
``CONVNEXTV2_KERNELS_CACHE`` or ``~/.cache/convnextv2_kernels``: after any of them changes, the committed table applies
until ``tune`` runs again.
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
from typing import Any, NamedTuple

import torch

from ..._console import visible
from ..._files import read_json, write_json
from ...errors import FileError
from ...settings import current
from ...version import __version__
from .availability import INTERPRETED, version


class Tile(NamedTuple):
    """Shape of a GEMM's tile, with its numbers of warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of each fused GEMM (``gemm_forward.py``, ``gemm_backward.py``), or None for the vendor's.

    ``source`` states the origin of the choice."""

    first: Tile | None = None
    second: Tile | None = None
    products: Tile | None = None
    hidden: Tile | None = None
    weight: Tile | None = None
    source: str = ""

    @property
    def forward_fused(self) -> bool:
        return self.first is not None and self.second is not None

    @property
    def backward_fused(self) -> bool:
        return self.products is not None and self.hidden is not None


KERNELS = Plan._fields[:-1]
UNFUSED = Plan(source="library")
_WITHOUT_DEPTH = ("products", "hidden")
# of Tile's fields in a file: Triton's matrix products begin at 16; the largest sides that "tune" tries are 128
_SIDES = (16, 32, 64, 128, 256)
_ALLOWED = {"rows": _SIDES, "columns": _SIDES, "depth": _SIDES, "warps": (1, 2, 4, 8, 16), "stages": (1, 2, 3, 4, 5, 6)}
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_WIDEST = 1 << 20  # widths in a file
_MAX_BYTES = 16 << 20
_WIDEST_BACKWARD = 256  # of C and O: hidden_backward holds whole rows of both in registers


class Shape(NamedTuple):
    """The inputs of the choice: dtype, widths, and rows of an image (on average where they differ). Not the number of
    images, because results must not depend on the partition of a batch into chunks."""

    dtype: torch.dtype
    width: int
    hidden: int
    out: int
    rows_each: int


# set by assumed_family() and using()
_assumed: str | None = None
_given: Plan | None = None


@contextlib.contextmanager
def using(plan: Plan) -> Iterator[None]:
    """Inside, every shape uses this plan: for timing and for tests."""
    global _given
    before, _given = _given, plan
    try:
        yield
    finally:
        _given = before


@contextlib.contextmanager
def assumed_family(name: str) -> Iterator[None]:
    """Inside, plans come from the committed table for a family, whatever the machine: to compile without a GPU."""
    global _assumed
    before, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = before


@functools.lru_cache
def family(index: int | None = None) -> str:
    """The GPU's family: shared memory and matrix units are alike within one."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return name if name in table() else "other"
    major, _minor = torch.cuda.get_device_capability(index)
    # consumer GPUs of the newest generations have the shared memory of the older ones
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def has_tf32() -> bool:
    """Whether the matrix units compute float32 from tf32 parts: NVIDIA's do."""
    return (_assumed or family()).startswith("sm_")


@functools.lru_cache
def table() -> dict[str, list[dict]]:
    return json.loads(Path(__file__).with_name("plans.json").read_text())["families"]


def plan_of(row: dict, source: str) -> Plan:
    """A row of a table as a plan."""
    tiles = {name: Tile(*row[name]) for name in KERNELS if row.get(name)}
    for name, tile in tiles.items():
        if any(side < 1 or side & (side - 1) for side in (*tile[:2], tile.depth or 1, tile.warps)):
            raise ValueError(f"{name} must have powers of two, got {list(tile)}")
    return Plan(**tiles, source=source)


def _fits(row: dict, shape: Shape) -> bool:
    low, high = row.get("width", (1, None))
    bits = torch.finfo(shape.dtype).bits
    return (
        bits in row["bits"]
        and low <= max(shape.width, shape.out) <= (high or shape.width + shape.out)
        and row.get("rows_each", 0) <= shape.rows_each
    )


def from_table(rows: list[dict], shape: Shape) -> Plan:
    """The first row that matches, otherwise unfused."""
    for row in rows:
        if _fits(row, shape):
            return plan_of(row, row["source"])
    return UNFUSED


@functools.lru_cache(maxsize=4096)
def _choose(shape: Shape, name: str, index: int | None, wanted: str) -> Plan:
    if wanted == "library" or shape.dtype == torch.float64:
        return UNFUSED
    if wanted == "fused":
        plan = _everything(table().get(name, []), shape)
    else:
        plan = measured(shape, index) or from_table(table().get(name, []), shape)
    if max(shape.width, shape.out) > _WIDEST_BACKWARD:
        plan = plan._replace(products=None, hidden=None)
    return plan


def forget() -> None:
    """Makes plans be looked up again, after measured ones have changed."""
    _choose.cache_clear()


def _everything(rows: list[dict], shape: Shape) -> Plan:
    """Every kernel fused, with the tiles of the last row of the table that has one."""
    tiles: dict[str, Any] = {}
    for row in rows:
        tiles |= {name: Tile(*row[name]) for name in KERNELS if row.get(name)}
    plan = Plan(**tiles, source="CONVNEXTV2_KERNELS_TRITON_PRODUCTS")
    return plan._replace(weight=None) if max(shape.width, shape.out) <= _WIDEST_BACKWARD else plan


def choose(shape: Shape, index: int | None = None) -> Plan:
    """The plan for a shape on a GPU, by default the current one."""
    if _given is not None:
        return _given
    if _assumed is not None:
        return from_table(table()[_assumed], shape)
    return _choose(shape, family(index), index, current.triton_gemms)


def directory() -> Path:
    """Folder of the measured plans."""
    if current.cache is not None:
        return current.cache
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "convnextv2_kernels"


@functools.lru_cache
def machine(index: int | None = None) -> dict[str, str]:
    """The GPU, driver and versions that a measurement is valid for."""
    versions = {"torch": torch.__version__, "triton": version() or "none", "library": __version__}
    if INTERPRETED:
        return {"gpu": "Triton's interpreter", "driver": "none", **versions}
    return {"gpu": torch.cuda.get_device_name(index), "driver": _driver(), **versions}


def _driver() -> str:
    """Version of the GPU driver; if the system does not report it, of the newest CUDA it supports, or of ROCm."""
    try:
        found = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found is not None:
        return found[0]
    # torch's stubs leave the function out
    return torch.version.hip or f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def path(index: int | None = None) -> Path:
    """File of the plans measured for a GPU, by default the current one."""
    key = machine(index)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(c if c.isalnum() else "-" for c in key["gpu"].lower())
    return directory() / f"plans-{name}-{digest}.json"


def _key(shape: Shape) -> tuple:
    """Shapes with the same key share a plan: the same widths, and rows of an image within a factor of two."""
    dtype = str(shape.dtype).removeprefix("torch.")
    return dtype, shape.width, shape.hidden, shape.out, shape.rows_each.bit_length()


@functools.lru_cache
def _read(file: Path, index: int | None = None) -> dict[tuple, Plan]:
    found, fault = _read_or_fault(file, index)
    if fault is not None:
        warnings.warn(f"measured plans are ignored, the built-in table is used: {fault}", stacklevel=2)
    return found


def _read_or_fault(file: Path, index: int | None) -> tuple[dict[tuple, Plan], str | None]:
    """The plans of a file, or none and why it cannot be used, in words that name the file and the field."""
    try:
        return _measured_plans(read_json(file, _MAX_BYTES), machine(index)), None
    except FileNotFoundError:
        return {}, None
    except FileError as error:
        return {}, visible(str(error))
    except OSError as error:
        return {}, visible(f"{file} cannot be read: {error.strerror or error}")
    except ValueError as error:
        return {}, visible(f"{file}: {error}")


def fault(index: int | None = None) -> str | None:
    """Why the plans measured for a GPU cannot be used, or None."""
    return _read_or_fault(path(index), index)[1]


def _measured_plans(content: Any, here: dict[str, str]) -> dict[tuple, Plan]:
    """What :func:`write` wrote; raises ValueError with the field, what it holds and what was expected."""
    _expect(isinstance(content, dict), "the content", content, "an object with machine and plans")
    _expect_fields("", content, ("machine", "plans"))
    _expect(content["machine"] == here, "machine", content["machine"], f"this one, {here}")
    _expect(isinstance(content["plans"], list), "plans", content["plans"], "a list")
    found = {}
    for number, row in enumerate(content["plans"]):
        field = f"plans[{number}]"
        _expect(isinstance(row, dict), field, row, "an object")
        _expect_fields(f"{field}.", row, ("key", "source"), KERNELS)
        _check_key(f"{field}.key", row["key"])
        source = row["source"]
        fits = isinstance(source, str) and len(source) <= 200 and source.isprintable()
        _expect(fits, f"{field}.source", source, "a line of text")
        for name in KERNELS:
            if name in row:
                _check_tile(f"{field}.{name}", name, row[name])
        found[tuple(row["key"])] = plan_of(row, source)
    return found


def _check_key(field: str, key: Any) -> None:
    fits = isinstance(key, list) and len(key) == len(Shape._fields) and isinstance(key[0], str) and key[0] in _DTYPES
    fits = fits and all(type(size) is int and 1 <= size <= _WIDEST for size in key[1:])
    _expect(fits, field, key, f"a dtype ({', '.join(_DTYPES)}), three widths and the bits of a number of rows")


def _check_tile(field: str, kernel: str, tile: Any) -> None:
    """The tiles that a kernel compiles for: sides that a matrix unit takes, and no more than registers hold."""
    _expect(isinstance(tile, list) and len(tile) == len(Tile._fields), field, tile, f"[{', '.join(Tile._fields)}]")
    for name, value in zip(Tile._fields, tile, strict=True):
        allowed = _ALLOWED[name]
        if name == "depth" and kernel in _WITHOUT_DEPTH:
            allowed = (0, *allowed)
        _expect(type(value) is int and value in allowed, f"{field}.{name}", value, f"one of {list(allowed)}")


def _expect(fits: bool, field: str, found: Any, expected: str) -> None:
    if not fits:
        text = json.dumps(found)
        raise ValueError(f"{field} is {text if len(text) <= 80 else text[:80] + '...'}, expected {expected}")


def _expect_fields(prefix: str, found: dict[str, Any], names: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    for name in names:
        if name not in found:
            raise ValueError(f"{prefix}{name} is missing")
    for name in found:
        if name not in (*names, *optional):
            raise ValueError(f"{prefix}{name[:80]} is unknown, expected {', '.join((*names, *optional))}")


def measured(shape: Shape, index: int | None = None) -> Plan | None:
    """The plan measured for a shape on a GPU, or None."""
    return _read(path(index), index).get(_key(shape))


def reject(shape: Shape, index: int | None, reason: Exception) -> bool:
    """Drops the measured plan of a shape, whose tiles this GPU cannot hold, with a warning.

    Returns False where the plan that applies is none of the measured ones."""
    if _given is not None or _assumed is not None or current.triton_gemms != "auto":
        return False
    file = path(index)
    if _read(file, index).pop(_key(shape), None) is None:
        return False
    forget()
    warnings.warn(
        f"the plan of {file} for {_key(shape)} is ignored, the built-in table is used: {reason}", stacklevel=2
    )
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time, if the system has file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    # without waiting for the reader of a FIFO of that name
    handle = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(plans: dict[Shape, Plan], index: int | None = None) -> Path:
    """Adds plans to those measured before, unless these cannot be used; running processes keep what they have read."""
    file = path(index)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.parent):
        _read.cache_clear()
        merged = _read_or_fault(file, index)[0] | {_key(shape): plan for shape, plan in plans.items()}
        rows = [
            {"key": list(key), "source": plan.source}
            | {name: list(tile) for name in KERNELS if (tile := getattr(plan, name)) is not None}
            for key, plan in sorted(merged.items())
        ]
        write_json(file, {"machine": machine(index), "plans": rows})
    _read.cache_clear()
    forget()
    return file
