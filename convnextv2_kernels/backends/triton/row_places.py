"""Where the rows of a map lie that a kernel reads or writes in the order of its packed side."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...params import Places


class RowPlaces(NamedTuple):
    """``half_width``: of ``[maps, 2h, 2w]`` in the order ``[maps, h, w, 2, 2]``. Otherwise visible rows of a dense map;
    by default the same rows."""

    half_width: int | None = None
    patch_of_slot: Tensor | None = None
    grid_w: int | None = None
    side: int = 1

    @classmethod
    def of(cls, places: Places | None) -> RowPlaces:
        return cls() if places is None else cls(None, places.patch_of_slot, places.grid[1], places.side)

    @property
    def visible(self) -> dict[str, Any]:
        """Arguments of a kernel that calls :func:`visible_row`."""
        return {"patch_of_slot": self.patch_of_slot, "grid_w": self.grid_w, "SIDE": self.side}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a kernel that calls :func:`map_row`."""
        return {"half_width": self.half_width, **self.visible}


@triton.jit
def visible_row(row, valid, patch_of_slot, grid_w, SIDE: tl.constexpr):
    """Row of a dense map for a row of ``[P, SIDE, SIDE]``; the same row without a table."""
    if patch_of_slot is None:
        return row
    else:
        within = row % (SIDE * SIDE)
        patch = tl.load(patch_of_slot + row // (SIDE * SIDE), mask=valid, other=0).to(tl.int64)
        return ((patch // grid_w * SIDE + within // SIDE) * grid_w + patch % grid_w) * SIDE + within % SIDE


@triton.jit
def map_row(row, valid, half_width, patch_of_slot, grid_w, SIDE: tl.constexpr):
    """Row of the map for a row of the packed side."""
    if half_width is None:
        return visible_row(row, valid, patch_of_slot, grid_w, SIDE)
    else:
        pixel = row // 4
        line = pixel // half_width * 2 + row % 4 // 2
        return (line * half_width + pixel % half_width) * 2 + row % 2


@triton.jit
def statistics_row(row, at, half_width):
    """Row of mean and rstd: those of 2x2 pixels lie as the map does, others as the packed side."""
    if half_width is None:
        return row
    else:
        return at
