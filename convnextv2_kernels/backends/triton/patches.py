"""Moves between dense maps and packed patches, and the stem's rows of pixels.

Elements are moved as integers of their size, so that every value of every dtype arrives bit for bit. A line of a patch
is ``side * C`` contiguous elements on both sides; a program moves 8 KB of a few lines, 64 bytes per thread. Hidden
pixels are never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...params import Places
from .launch import cdiv, launch, next_power_of_2, operator

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_TILE_BYTES = 8192


def _words(x: Tensor) -> Tensor:
    """x as integers of its elements' size; elements of 16 bytes as two integers each in the last dimension."""
    return x.view(_WORDS[x.element_size()])


def _tile(width: int, words: Tensor) -> tuple[int, int]:
    """Lines and columns of a tile: at least 64 columns, more where they divide a line's width."""
    columns = min(next_power_of_2(width), max(64, min(width & -width, 256)))
    return min(128, _TILE_BYTES // (columns * words.element_size())), columns


@triton.jit
def _line_and_column(WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Lines and columns of this program; neighbouring programs process consecutive columns of the same lines."""
    blocks: tl.constexpr = (WIDTH + BN - 1) // BN
    program = tl.program_id(0)
    line = (program // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    return line, (program % blocks) * BN + tl.arange(0, BN)


@triton.jit
def gather_patches_kernel(
    source, patch_of_slot, target, lines, grid_w,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Line y of slot p, ``target [p, y, WIDTH]``, from ``source [images * grid_h, SIDE, grid_w, WIDTH]``."""
    line, column = _line_and_column(WIDTH, BM, BN)
    valid = line < lines
    inside = valid[:, None] & (column < WIDTH)[None, :]
    patch = tl.load(patch_of_slot + line // SIDE, mask=valid, other=0).to(tl.int64)
    dense = (patch // grid_w * SIDE + line % SIDE) * grid_w + patch % grid_w
    values = tl.load(source + ((dense * WIDTH)[:, None] + column[None, :]), mask=inside)
    tl.store(target + ((line * WIDTH)[:, None] + column[None, :]), values, mask=inside)


@triton.jit
def put_patches_kernel(
    source, patch_of_slot, target, lines, grid_w,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Back to ``target [images * grid_h, SIDE, grid_w, WIDTH]``; hidden sites keep their values."""
    line, column = _line_and_column(WIDTH, BM, BN)
    valid = line < lines
    inside = valid[:, None] & (column < WIDTH)[None, :]
    patch = tl.load(patch_of_slot + line // SIDE, mask=valid, other=0).to(tl.int64)
    dense = (patch // grid_w * SIDE + line % SIDE) * grid_w + patch % grid_w
    values = tl.load(source + ((line * WIDTH)[:, None] + column[None, :]), mask=inside)
    tl.store(target + ((dense * WIDTH)[:, None] + column[None, :]), values, mask=inside)


@triton.jit
def scatter_patches_kernel(
    source, slot_of_patch, fill, target, lines, grid_w,
    SIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The reverse, in the order of the dense map; ``fill [C]`` or zero for a patch without a slot."""
    line, column = _line_and_column(WIDTH, BM, BN)
    valid = line < lines
    inside = valid[:, None] & (column < WIDTH)[None, :]
    above = line // grid_w
    patch = above // SIDE * grid_w + line % grid_w
    slot = tl.load(slot_of_patch + patch, mask=valid, other=-1).to(tl.int64)
    visible = (slot >= 0)[:, None]
    packed = slot * SIDE + above % SIDE
    values = tl.load(source + ((packed * WIDTH)[:, None] + column[None, :]), mask=inside & visible, other=0)
    if fill is not None:
        hidden = tl.load(fill + column % C, mask=column < WIDTH, other=0)
        values = tl.where(visible, values, hidden[None, :])
    tl.store(target + ((line * WIDTH)[:, None] + column[None, :]), values, mask=inside)


@triton.jit
def patch_pixels_kernel(
    images, patch_of_slot, target, lines, grid_h, grid_w,
    SIDE: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Pixel (y, x) of slot p, ``target [p, y, x, C, 4, 4]``, from ``images [images, C, grid_h * SIDE * 4, grid_w * SIDE
    * 4]``; RUN words are four elements. Neighbouring lines read neighbouring runs, which the cache combines."""
    line, column = _line_and_column(WIDTH, BM, BN)
    valid = line < lines
    inside = valid[:, None] & (column < WIDTH)[None, :]
    slot = line // (SIDE * SIDE)
    patch = slot
    if patch_of_slot is not None:
        patch = tl.load(patch_of_slot + slot, mask=valid, other=0).to(tl.int64)
    row = patch // grid_w
    y = row % grid_h * SIDE + line // SIDE % SIDE
    x = patch % grid_w * SIDE + line % SIDE
    # in runs, of which an image's row has grid_w * SIDE
    runs = tl.cast(grid_w, tl.int64) * SIDE
    height = tl.cast(grid_h, tl.int64) * (SIDE * 4)
    first = (row // grid_h * C * height + y * 4) * runs + x
    within = (column // (4 * RUN) * height + column // RUN % 4) * runs
    place = (first[:, None] + within[None, :]) * RUN + (column % RUN)[None, :]
    values = tl.load(images + place, mask=inside)
    tl.store(target + ((line * WIDTH)[:, None] + column[None, :]), values, mask=inside)


def _move(kernel, target: Tensor, lines: int, width: int, **arguments) -> None:
    """Launches a kernel that writes ``target [lines, width]``."""
    rows, columns = _tile(width, target)
    launch(
        kernel, (cdiv(lines, rows) * cdiv(width, columns),),
        target=target, lines=lines, WIDTH=width, BM=rows, BN=columns, **arguments,
    )  # fmt: skip


@operator
def gather_patches(x: Tensor, patch_of_slot: Tensor, grid_h: int, grid_w: int) -> Tensor:
    """``x [N, Gh*s, Gw*s, C]``, patch_of_slot ``[P]`` int32 -> visible patches ``[P, s, s, C]``."""
    side, slots = x.shape[1] // grid_h, patch_of_slot.shape[0]
    y = x.new_empty(slots, side, side, x.shape[-1])
    source, target = _words(x), _words(y)
    _move(
        gather_patches_kernel, target, slots * side, side * source.shape[-1],
        source=source, patch_of_slot=patch_of_slot, grid_w=grid_w, SIDE=side,
    )  # fmt: skip
    return y


def put_patches(x: Tensor, places: Places, out: Tensor) -> None:
    """``x [P*s*s, C]`` -> the visible rows of the map ``out [N, Gh*s, Gw*s, C]``, of x's dtype."""
    source, target, side = _words(x), _words(out), places.side
    _move(
        put_patches_kernel, target, places.patch_of_slot.shape[0] * side, side * source.shape[-1],
        source=source, patch_of_slot=places.patch_of_slot, grid_w=places.grid[1], SIDE=side,
    )  # fmt: skip


@operator
def scatter_patches(x: Tensor, slot_of_patch: Tensor, grid_h: int, grid_w: int, fill: Tensor | None) -> Tensor:
    """``x [P, s, s, C]``, slot_of_patch ``[N, Gh*Gw]`` int32, -1 where hidden -> ``[N, Gh*s, Gw*s, C]``; hidden sites
    hold ``fill [C]`` of x's dtype, or zero."""
    images, side = slot_of_patch.shape[0], x.shape[1]
    y = x.new_empty(images, grid_h * side, grid_w * side, x.shape[-1])
    source, target = _words(x), _words(y)
    channels = source.shape[-1]
    _move(
        scatter_patches_kernel, target, images * grid_h * side * grid_w, side * channels,
        source=source, slot_of_patch=slot_of_patch, fill=None if fill is None else _words(fill.reshape(-1)),
        grid_w=grid_w, SIDE=side, C=channels,
    )  # fmt: skip
    return y


@operator
def patch_pixels(images: Tensor, patch_of_slot: Tensor | None, grid_h: int, grid_w: int) -> Tensor:
    """``images [N, C, H, W]``, patch_of_slot ``[P]`` int32 -> rows of 4x4 pixels ``[P, s, s, C*16]``, ``s = H / (4
    Gh)``; without patch_of_slot every patch of side 1, ``[N, Gh, Gw, C*16]``."""
    n, channels, height, width = images.shape
    side = height // (4 * grid_h)
    if patch_of_slot is None:
        rows = images.new_empty(n, grid_h, grid_w, channels * 16)
    else:
        rows = images.new_empty(patch_of_slot.shape[0], side, side, channels * 16)
    source, target = _words(images), _words(rows)
    run = 4 * source.shape[-1] // max(1, width)
    _move(
        patch_pixels_kernel, target, rows.numel() // max(1, channels * 16), channels * 4 * run,
        images=source, patch_of_slot=patch_of_slot, grid_h=grid_h, grid_w=grid_w, SIDE=side, C=channels, RUN=run,
    )  # fmt: skip
    return rows
