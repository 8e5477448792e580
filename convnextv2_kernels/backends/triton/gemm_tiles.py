"""Partition of the rows of a chunk of images into tiles of a GEMM.

GRN's scale and sums belong to an image, and the number of its rows is not a multiple of the tile's:

* ``image``: every image is tiled by itself, and its last tile is short. This wastes 5 % of the work at 1216 rows per
  image (FCMAE, stage 1, tiles of 128), 68 % at 76.
* ``table``: the same for images of unequal size. A table built on the device holds the image of each tile, so that the
  host need not know it; the host launches ``ceil(M / BM) + N`` tiles, some of which have no work.
* ``flat``: tiles run across image borders, for small images of equal size. A tile then covers up to ``SPAN`` images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...params import Segments
from .launch import cdiv, launch

# the most images in a flat tile: its epilogue sums their rows one after the other, or by one GEMM
MOST_IMAGES = 16


class Tiles(NamedTuple):
    """Tiles of ``size`` rows of so many ``images``. Arguments of a kernel: ``kind`` and ``span`` are its constants KIND
    and SPAN."""

    kind: str
    size: int
    count: int  # type: ignore[assignment]  # hides tuple's method, which nobody needs
    span: int
    images: int
    each: int
    owner: Tensor | None
    first: Tensor | None
    begin: Tensor | None

    @property
    def arguments(self) -> dict:
        return {
            "images": self.images, "each": self.each, "owner": self.owner, "first": self.first, "begin": self.begin,
            "KIND": self.kind, "SPAN": self.span, "BM": self.size,
        }  # fmt: skip


def partition(rows: int, images: Segments, size: int, allow_flat: bool = True) -> Tiles:
    """Tiles of a chunk's rows (at least one); flat where tiling every image by itself would waste much."""
    each = images.rows_each(rows)
    if each is None:
        return _table(rows, images, size)
    if allow_flat and each < 2 * size and each % size:
        span = cdiv(size - 1, each) + 1
        return Tiles("flat", size, cdiv(rows, size), span, images.count, each, None, None, None)
    return Tiles("image", size, images.count * cdiv(each, size), 1, images.count, each, None, None, None)


def _table(rows: int, images: Segments, size: int) -> Tiles:
    assert images.offsets is not None
    device = images.offsets.device
    begin = (images.offsets - images.offsets[0]).long() * images.rows_per_slot
    tiles = (begin.diff() + (size - 1)) // size
    ends = tiles.cumsum(0)
    count = cdiv(rows, size) + images.count
    owner = torch.searchsorted(ends, torch.arange(count, device=device), right=True).int()
    first = torch.nn.functional.pad(ends, (1, 0)).int()
    return Tiles("table", size, count, 1, images.count, 0, owner, first, begin)


@triton.jit
def tile_rows(tile, M, images, each, owner, first, begin, KIND: tl.constexpr, BM: tl.constexpr):
    """``(image, row, rows)``: the image of a tile (of its first row), its first row and its number of rows."""
    if KIND == "image":
        each = tl.cast(each, tl.int64)
        per_image = tl.cdiv(each, BM)
        image = tile // per_image
        within = (tile % per_image) * BM
        return image.to(tl.int32), image * each + within, tl.minimum(each - within, BM).to(tl.int32)
    elif KIND == "flat":
        row = tile * BM
        return (row // each).to(tl.int32), row, tl.minimum(tl.cast(M, tl.int64) - row, BM).to(tl.int32)
    else:
        image = tl.load(owner + tile)
        used = image < images
        image = tl.where(used, image, 0)
        within = (tile - tl.load(first + image)) * BM
        row = tl.load(begin + image) + within
        left = tl.load(begin + image + 1) - row
        return image, row, tl.where(used, tl.minimum(left, BM), 0).to(tl.int32)


@triton.jit(do_not_specialize=["M", "images", "each"])
def image_sums_kernel(
    parts, sums, M, images, each, first, W,
    KIND: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums of one image over its tiles, in order, from ``parts [tiles, SPAN, W]``."""
    image = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < W
    if KIND == "image":
        count = tl.cdiv(tl.cast(each, tl.int64), BM)
        begin = image * count
        end = begin + count
    elif KIND == "flat":
        begin = image * each // BM
        end = tl.cdiv((image + 1) * each, BM)
    else:
        begin = tl.load(first + image).to(tl.int64)
        end = tl.load(first + image + 1).to(tl.int64)
    total = tl.zeros([BN], parts.dtype.element_ty)
    for tile in range(begin, end):
        slot = tl.cast(tile, tl.int64)
        if SPAN > 1:
            slot = slot * SPAN + (image - slot * BM // each)
        total += tl.load(parts + slot * W + columns, mask=inside, other=0.0)
    tl.store(sums + image * W + columns, total, mask=inside)


def image_sums(parts: Tensor, tiles: Tiles, rows: int) -> Tensor:
    """``[tiles, SPAN, W]`` -> ``[images, W]``, in the order of the tiles."""
    width, images = parts.shape[-1], tiles.images
    if tiles.kind == "image" and tiles.count == images:
        return parts.view(images, width)
    sums = parts.new_empty(images, width)
    block = 128
    launch(
        image_sums_kernel, (images, cdiv(width, block)), num_warps=1,
        parts=parts, sums=sums, M=rows, images=images, each=tiles.each, first=tiles.first, W=width,
        KIND=tiles.kind, SPAN=tiles.span, BM=tiles.size, BN=block,
    )  # fmt: skip
    return sums
