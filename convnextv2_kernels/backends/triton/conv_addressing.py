"""Addressing of the depthwise convolution's pixels, for dense maps and packed patches alike.

The unit of work is a run: ``RUN`` adjacent pixels of one line of a map. Their K x K windows overlap, so that per line
of taps ``RUN + K - 1`` loaded pixels feed ``RUN * K`` multiply-adds from registers. Runs are numbered by map, position
in the line, and line: consecutive runs are below each other, and share input in L1. Packed patches of up to eight
pixels a side have one run per line; the neighbour that a tap falls into is then known at compile time, and the table is
read once per neighbour and line of taps.

The number of channels is a constant of the kernels, so that the offsets to the next pixel and the next tap are part of
the load instructions, which saves a fifth of all instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv


class Geometry:
    """Sizes of ``x [maps, H, W, C]`` and the partition of its lines; ``constants`` and ``sizes`` are arguments."""

    def __init__(self, x: Tensor, neighbours: Tensor | None, kernel_size: int):
        maps, height, width, channels = x.shape
        if neighbours is not None and width > 8:
            run = 8
        else:
            # the longest of the lengths that leave the fewest idle pixels in a line
            run = min(range(min(4, width), min(8, width) + 1), key=lambda n: (cdiv(width, n) * n, -n))
        groups = cdiv(width, run)
        self.runs = maps * height * groups
        self.run = run
        side = 0 if neighbours is None else width
        self.sizes = {"runs": self.runs, "height": height, "width": width, "groups": groups}
        self.constants = {
            "C": channels,
            "K": kernel_size,
            "SIDE": side,
            "RADIUS": cdiv(kernel_size // 2, side) if side else 0,
            "RUN": run,
            "EXACT": width % run == 0,
        }


@triton.jit
def place_of(run, height, width, groups, SIDE: tl.constexpr, RUN: tl.constexpr):
    """Map, line and first pixel of a run, and the row of that pixel among all pixels."""
    if SIDE > 0:  # dividing by constants
        height = SIDE
        width = SIDE
        groups = (SIDE + RUN - 1) // RUN
    column = run // height
    y = run - column * height
    owner = tl.cast(column // groups, tl.int64)
    first = column % groups * RUN
    return owner, y, first, (owner * height + y) * width + first


@triton.jit
def source_line(
    x, neighbours, owner, y, there, height, width, C: tl.constexpr, SIDE: tl.constexpr, RADIUS: tl.constexpr
):  # fmt: skip
    """Input of :func:`source_pixel` for the pixels of lines ``y`` of map ``owner`` and around it. Dense: address of
    the line. Packed: address of the line of the neighbour table, and the line inside the patches it names."""
    if SIDE == 0:
        line = x + (owner * height + y) * (tl.cast(width, tl.int64) * C)
        return line, there & (y >= 0) & (y < height), y
    else:
        up = (y + RADIUS * SIDE) // SIDE
        table = neighbours + owner * ((2 * RADIUS + 1) * (2 * RADIUS + 1)) + up * (2 * RADIUS + 1)
        return table, there, y - (up - RADIUS) * SIDE


@triton.jit
def source_pixel(
    x, line, there, y, first, width, columns,
    STEP: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, RADIUS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Addresses ``[lines, BC]`` of ``columns [1, BC]`` of pixel ``first + STEP``, and which lines have it, visible.

    Terms that depend on STEP come last and are constant where possible: they then cost no instruction."""
    if SIDE == 0:
        column = first + STEP
        start = (line + first * C)[:, None] + columns
        return start + STEP * C, there & (column >= 0) & (column < width)
    elif RUN == SIDE:
        across: tl.constexpr = (STEP + RADIUS * SIDE) // SIDE
        slot = tl.load(line + across, mask=there, other=-1)
        start = (x + slot.to(tl.int64) * (SIDE * SIDE * C) + y * (SIDE * C))[:, None] + columns
        return start + (STEP + RADIUS * SIDE - across * SIDE) * C, slot >= 0
    else:
        shifted = first + (STEP + RADIUS * SIDE)
        across = shifted // SIDE
        # the last run of a line may extend past its end, and past the last neighbour
        slot = tl.load(line + across, mask=there & (across <= 2 * RADIUS), other=-1)
        inner = y * SIDE + (shifted - across * SIDE)
        return (x + slot.to(tl.int64) * (SIDE * SIDE * C) + inner * C)[:, None] + columns, slot >= 0
