"""The MLP's fused products by themselves and together, beside the vendor's: bytes, operations and times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .bytes_moved import STATISTIC, maps
from .setting import Skip
from .timing import Timer, median, warm_calls


class Size(NamedTuple):
    """A product's shape: rows ``M`` of ``images``, widths C, H and O, bytes of a feature, and ``parts``, how many
    float32 rows of partial sums its tiling writes for each hidden column (or output, for the weight)."""

    rows: int
    width: int
    hidden: int
    out: int
    images: int
    itemsize: int
    parts: int


def first_bytes(s: Size) -> int:
    """Reads y, w1 and b1; writes a, partial sums of squares, and their sums by image unless those are the same."""
    sums = s.parts + (s.images if s.parts != s.images else 0)
    features = maps(s.rows, s.width + s.hidden, s.itemsize, 1) + maps(s.hidden, s.width + 1, s.itemsize, 1)
    return features + maps(sums, s.hidden, STATISTIC, 1)


def second_bytes(s: Size) -> int:
    """Reads a, the residual, w2, b2 and each image's scale; writes the result."""
    features = maps(s.rows, s.hidden + 2 * s.out, s.itemsize, 1) + maps(s.out, s.hidden + 1, s.itemsize, 1)
    return features + maps(s.images, s.hidden, STATISTIC, 1)


def products_bytes(s: Size) -> int:
    """Reads a, d and w2; writes G and t in float32, for each part of an image's rows."""
    features = maps(s.rows + s.out, s.hidden, s.itemsize, 1) + maps(s.rows, s.out, s.itemsize, 1)
    return features + maps(s.parts, s.hidden * (s.out + 1), STATISTIC, 1)


def hidden_bytes(s: Size) -> int:
    """Reads a, d, z, 1/std, both weights, scale and kappa; writes da, dx and partial sums of da."""
    features = maps(s.rows, 2 * s.hidden + s.out + 2 * s.width, s.itemsize, 1)
    weights = maps(s.hidden, s.width + s.out, s.itemsize, 1)
    return features + weights + maps(s.parts + 2 * s.images, s.hidden, STATISTIC, 1) + STATISTIC * s.rows


def weight_bytes(s: Size) -> int:
    """Reads a, d and each image's scale; writes the weight's gradient in float32, for each part of the rows."""
    features = maps(s.rows, s.hidden + s.out, s.itemsize, 1)
    return features + maps(s.parts * s.out + s.images, s.hidden, STATISTIC, 1)


LEAST_BYTES: dict[str, Callable[[Size], int]] = {
    "first": first_bytes,
    "second": second_bytes,
    "products": products_bytes,
    "hidden": hidden_bytes,
    "weight": weight_bytes,
}


def flops(name: str, s: Size) -> int:
    """Of the matrix products in a kernel, two for each multiply-add; what is done beside them is not counted."""
    widths = {"first": s.width, "hidden": s.width + s.out}
    return 2 * s.rows * s.hidden * widths.get(name, s.out)


def size_of(case, name: str, tile) -> Size:
    """Size of a kernel of a case of ``backends.triton.tune`` in a tile, with the parts the library cuts it into."""
    from convnextv2_kernels.backends.triton import mlp
    from convnextv2_kernels.backends.triton.gemm_tiles import partition

    shape, rows, images = case.shape, case.y.shape[0], case.images.count
    parts = images
    if name in ("first", "hidden"):
        tiles = partition(rows, case.images, tile.rows, allow_flat=name == "first")
        parts = tiles.count * tiles.span
    elif name == "products":
        parts = images * mlp.image_splits(rows, case.images, False, -(-shape.hidden // tile.columns))
    elif name == "weight":
        parts = mlp.splits(rows, -(-shape.out // tile.rows) * -(-shape.hidden // tile.columns))
    return Size(rows, shape.width, shape.hidden, shape.out, images, shape.dtype.itemsize, parts)


def vendor(case, name: str) -> Callable[[], object]:
    """The matrix products of a kernel alone, by the vendor's library."""
    from convnextv2_kernels.backends.base import statistics_gemm

    a, d = case.a, case.d
    n, w1, w2 = case.images.count, case.w1, case.w2

    def by_image(t: Tensor) -> Tensor:
        return t.view(n, -1, t.shape[1])

    if name == "first":
        return lambda: torch.mm(case.y, w1.t())
    if name == "second":
        return lambda: torch.mm(a, w2.t())
    if name == "products":
        return lambda: statistics_gemm(by_image(d).transpose(1, 2), by_image(a))
    if name == "hidden":
        return lambda: torch.mm(torch.mm(d, w2), w1)
    return lambda: statistics_gemm(d.t(), a)


class Tiles(NamedTuple):
    """The committed plan of a shape, and a tile for every kernel: that of the plan, else one of the last row of the
    table that has one, to compare the library with."""

    plan: object
    all: dict

    @classmethod
    def of(cls, shape) -> Tiles:
        from convnextv2_kernels.backends.triton import plans, tune

        rows = plans.table().get(plans.family(), [])
        tiles = {name: candidates[0] for name, candidates in tune.CANDIDATES.items()}
        plan = plans.from_table(rows, shape)
        for other in (*(plans.plan_of(row, "") for row in rows), plan):
            tiles |= {name: tile for name in plans.KERNELS if (tile := getattr(other, name)) is not None}
        return cls(plan, tiles)

    def planned(self, name: str) -> bool:
        return getattr(self.plan, name) is not None


def warm_seconds(timer: Timer, call: Callable[[], object]) -> float:
    """Median of warm calls in a graph."""
    once = median(timer.calls([call]))
    return median(timer.calls([call] * warm_calls(once, not timer.on_gpu)))


def measure_kernel(case, name: str, tiles: Tiles, timer: Timer, copy_tbps: float, tflops: float) -> dict:
    """One fused kernel; Skip where there is none of this shape."""
    from triton.runtime.errors import OutOfResources

    tile, planned = tiles.all[name], tiles.planned(name)
    call = case.kernel(name, tile)
    if call is None:
        raise Skip("no tile holds rows as wide, or it would span too many images")
    try:
        call()
    except OutOfResources as error:
        if planned:
            raise
        raise Skip(f"the tile {list(tile)} is not in the plan, and does not fit: {error}") from error
    seconds, size = warm_seconds(timer, call), size_of(case, name, tile)
    least, rate = LEAST_BYTES[name](size), 1e-12 * flops(name, size) / seconds
    return {
        "us": 1e6 * seconds,
        "vendor_us": 1e6 * warm_seconds(timer, vendor(case, name)),
        "MB": 1e-6 * least,
        "copy_share": 1e-12 * least / copy_tbps / seconds,
        "TFLOPs": rate,
        "product_share": rate / tflops,
        "tile": list(tile),
        "planned": planned,
    }


def taken(direction: str, plan) -> str:
    """What a plan has a whole forward or backward done by."""
    if direction == "forward":
        return "fused" if plan.forward_fused else "library"
    return "fused" if plan.backward_fused else "weight" if plan.weight else "library"


def measure_whole(case, direction: str, tiles: Tiles, backend, timer: Timer) -> dict:
    """Forward or backward by every way, in turn; whether the committed plan takes the fastest."""
    from triton.runtime.errors import OutOfResources

    times = {}
    for way, call in case.variants(direction, backend, tiles.all).items():
        try:
            call()
        except OutOfResources:
            if way == taken(direction, tiles.plan):
                raise
            continue  # in tiles of no plan
        times[way] = warm_seconds(timer, call)
    fastest, planned = min(times, key=times.get), taken(direction, tiles.plan)
    return {
        **{f"{way}_us": 1e6 * seconds for way, seconds in times.items()},
        "plan": planned,
        "source": tiles.plan.source,
        "fastest": fastest,
        "plan_is_fastest": planned == fastest,
    }
