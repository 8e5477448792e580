"""Which of the MLP's products are fused with their neighbours, and in tiles of what shape.

Measured choices come first: those of ``python -m convnextv2_kernels tune`` on this very machine (``cache.py``), then
the committed table ``plans.json``, a list per GPU family of which the first row that fits is taken. Nothing is tried
out in a training step. ``CONVNEXTV2_KERNELS_TRITON_PRODUCTS`` = ``library`` or ``fused`` overrides both.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from . import INTERPRETED


class Tile(NamedTuple):
    """Shape of a GEMM's tile, with its numbers of warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of each fused product (``products.py``, ``products_backward.py``), or None where the library's is taken.

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
LIBRARY = Plan(source="library")
_WIDEST_BACKWARD = 256  # of C and O: hidden_backward holds whole rows of both in registers


class Shape(NamedTuple):
    """The inputs of the choice: dtype, widths, and rows of an image (on average where they differ). Not the number of
    images, because results must not depend on the partition of a batch into chunks."""

    dtype: torch.dtype
    width: int
    hidden: int
    out: int
    rows_each: int


def wish() -> str:
    """``auto``, ``fused`` or ``library``, of ``CONVNEXTV2_KERNELS_TRITON_PRODUCTS``."""
    value = os.environ.get("CONVNEXTV2_KERNELS_TRITON_PRODUCTS") or "auto"
    if value not in ("auto", "fused", "library"):
        raise ValueError(f"CONVNEXTV2_KERNELS_TRITON_PRODUCTS must be auto, fused or library, got {value!r}")
    return value


_assumed: str | None = None


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
    return LIBRARY


@functools.lru_cache(maxsize=4096)
def _choose(shape: Shape, name: str, index: int | None, wanted: str) -> Plan:
    if wanted == "library" or shape.dtype == torch.float64:
        return LIBRARY
    if wanted == "fused":
        plan = _everything(table().get(name, []), shape)
    else:
        from . import plan_cache

        plan = plan_cache.measured(shape, index) or from_table(table().get(name, []), shape)
    if max(shape.width, shape.out) > _WIDEST_BACKWARD:
        plan = plan._replace(products=None, hidden=None)
    return plan


def forget() -> None:
    """Makes plans be looked up again, after measured ones have changed."""
    _choose.cache_clear()


def _everything(rows: list[dict], shape: Shape) -> Plan:
    """Every kernel fused, with the tiles of the last row of the table that has one."""
    plan = Plan(source="CONVNEXTV2_KERNELS_TRITON_PRODUCTS")
    for row in rows:
        plan = plan._replace(**{name: Tile(*row[name]) for name in KERNELS if row.get(name)})
    return plan._replace(weight=None) if max(shape.width, shape.out) <= _WIDEST_BACKWARD else plan


def choose(shape: Shape, index: int | None = None) -> Plan:
    """The plan for a shape on a GPU, by default the current one."""
    if _assumed is not None:
        return from_table(table()[_assumed], shape)
    return _choose(shape, family(index), index, wish())
