"""Measures which products to fuse, and in what tiles, for shapes of the MLP on the current device.

Each fused kernel is timed in every candidate tile, then forward and backward as a whole against the library's, all
interleaved so that drift falls on every one alike; what is faster becomes the plan of the shape (``cache.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from .. import base
from . import INTERPRETED, fused
from .gemm_backward import hidden_backward, image_products, weight_product
from .gemm_forward import first_product, second_product
from .gemm_tiles import Images, cut
from .plans import KERNELS, Plan, Shape, Tile

# rows, columns, depth, warps, stages; tiles of 128 x 128 results need 8 warps, or registers spill
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "first": (
        Tile(128, 128, 32, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3),
        Tile(64, 64, 32, 4, 3), Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2),
    ),
    "second": (
        Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3),
        Tile(128, 128, 32, 8, 2), Tile(64, 64, 64, 4, 2),
    ),
    "products": (
        Tile(64, 64, 0, 4, 2), Tile(64, 64, 0, 8, 3), Tile(64, 64, 0, 8, 2), Tile(128, 64, 0, 8, 2),
        Tile(32, 64, 0, 4, 2),
    ),
    "hidden": (
        Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 4, 2), Tile(128, 32, 0, 8, 2), Tile(64, 32, 0, 4, 2),
    ),
    "weight": (Tile(64, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2), Tile(128, 128, 64, 8, 3), Tile(64, 64, 32, 4, 2)),
}  # fmt: skip
_EPS = 1e-6
_CALLS = 5  # in one graph
_MARGIN = 0.03  # by which a way has to beat the library


class Finding(NamedTuple):
    """The plan of a shape and seconds of what it was chosen from: ``forward``, ``backward``, each by way."""

    plan: Plan
    forward: dict[str, float]
    backward: dict[str, float]


class Case:
    """Tensors of a shape, and the calls to time. ``keep_a`` as with the policy "hidden", a GPU's default."""

    def __init__(self, shape: Shape, images: int, device: str):
        self.shape = shape
        self.images = Images(None, 1, images)
        rows = images * shape.rows_each
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = shape.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).to(device, dtype)

        f32 = torch.float32
        self.y, self.d = draw(rows, shape.width), draw(rows, shape.out)
        self.w1, self.b1 = draw(shape.hidden, shape.width, scale=shape.width**-0.5), draw(shape.hidden)
        self.w2, self.b2 = draw(shape.out, shape.hidden, scale=shape.hidden**-0.5), draw(shape.out)
        self.gamma, self.beta = draw(shape.hidden, dtype=f32), draw(shape.hidden, dtype=f32)
        self.residual, self.rstd = draw(rows, shape.out), draw(rows, dtype=f32).abs()
        self.a = torch.nn.functional.linear(self.y, self.w1, self.b1)
        self.norm, self.scale = draw(images, shape.hidden, dtype=f32).abs(), draw(images, shape.hidden, dtype=f32)
        self.d_sum = self.d.sum(0, dtype=f32)

    def kernel(self, name: str, tile: Tile) -> Callable[[], object] | None:
        """One fused kernel with a tile, or None if impossible."""
        s, n = self.shape, self.images.count
        rows = self.y.shape[0]
        if name in ("products", "hidden") and max(s.width, s.out) > 256:
            return None
        if name == "products":
            splits = fused.image_splits(rows, self.images, False, -(-s.hidden // tile.columns))
            return lambda: image_products(self.a, "gelu", self.d, self.w2, *self.images, splits, tile)
        if name == "weight":
            blocks = -(-s.out // tile.rows) * -(-s.hidden // tile.columns)
            splits = fused.splits(rows, blocks)
            return lambda: weight_product(self.a, "gelu", self.d, self.scale, *self.images, splits, tile)
        tiles = cut(rows, self.images, tile.rows, allow_flat=name != "hidden")
        if tiles.span > fused.MOST_IMAGES:
            return None
        if name == "first":
            out = torch.empty_like(self.a)
            return lambda: first_product(self.y, self.w1, self.b1, "gelu", out, True, tiles, n, tile)
        if name == "second":
            out = torch.empty_like(self.residual)
            second = (self.a, "gelu", self.w2, self.b2, self.scale, self.residual, None, out, tiles, n, tile)
            return lambda: second_product(*second)
        hidden = (self.a, "gelu", self.d, self.w1, self.w2, self.scale, self.scale, self.y, self.rstd, tiles, n, tile)
        return lambda: hidden_backward(*hidden)

    def forward(self, k, plan: Plan | None) -> Callable[[], object]:
        """The whole forward by a plan, or by the library."""
        if plan is None:

            def run():
                a = k.linear(self.y, self.w1, self.b1)
                inputs = (self.gamma, self.beta, _EPS, self.w2, self.b2, self.residual, True)
                return k.gelu_grn_linear(a, "gelu", *inputs, *self.images)

            return run
        inputs = (self.y, self.w1, self.b1, "gelu", self.gamma, _EPS, self.w2, self.b2, self.residual, None)
        return lambda: fused.forward_by(plan, *inputs, self.y.dtype, True, self.images, False)

    def backward(self, k, plan: Plan | None) -> Callable[[], object]:
        """The whole backward up to the gradient of the convolution's output, by a plan or by the library."""
        inputs = (self.a, "gelu", self.d, self.d_sum, self.norm, self.gamma, self.beta, _EPS)
        if plan is not None:
            rest = (self.w1, self.w2, self.y, self.rstd, self.images, False)
            return lambda: fused.backward_by(plan, *inputs, *rest)

        def run():
            da, *_ = base.gelu_grn_linear_backward(k.Passes, *inputs, self.w2, True, *self.images)
            return k.normalized_backward(k.linear_input_grad(da, self.w1), self.y, self.rstd, None)

        return run

    def ways(self, direction: str, k, tiles: Mapping[str, Tile]) -> dict[str, Callable[[], object]]:
        """The whole forward or backward by the library and by each way that has its tiles."""
        can = {name for name, tile in tiles.items() if self.kernel(name, tile) is not None}
        if direction == "forward":
            found = {"library": self.forward(k, None)}
            if {"first", "second"} <= can:
                found["fused"] = self.forward(k, Plan(first=tiles["first"], second=tiles["second"]))
            return found
        found = {"library": self.backward(_With(k, lambda *_: None), None)}
        if {"products", "hidden"} <= can:
            found["fused"] = self.backward(k, Plan(products=tiles["products"], hidden=tiles["hidden"]))
        # where the library's way does not get the weight's gradient from products by image
        if "weight" in can and self.shape.rows_each <= 2 * self.shape.out:
            found["weight"] = self.backward(_With(k, fused.weight_grad_by(tiles["weight"])), None)
        return found


class _With:
    """A backend's primitives with another way to the second weight's gradient."""

    def __init__(self, k, weight_grad: Callable):
        self.Passes = type("Passes", (k.Passes,), {"scaled_weight_grad": staticmethod(weight_grad)})
        self.normalized_backward, self.linear_input_grad = k.normalized_backward, k.linear_input_grad


def _seconds(functions: Mapping, repetitions: int) -> dict:
    """Median seconds of each call, interleaved; calls that exceed the GPU's memory or fail to compile are skipped."""
    ready = {}
    for key, function in functions.items():
        try:
            function()
            ready[key] = _repeated(function)
        except (OutOfResources, CompilationError, torch.OutOfMemoryError):
            continue
    samples = {key: [] for key in ready}
    for _ in range(repetitions):
        for key, run in ready.items():
            samples[key].append(run())
    return {key: statistics.median(times) for key, times in samples.items()}


def _repeated(function: Callable[[], object]) -> Callable[[], float]:
    """Runs a function and returns its seconds. On a GPU several calls run in a graph: otherwise launch overhead would
    dominate small kernels."""
    if INTERPRETED:

        def run():
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay():
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / _CALLS

    return replay


def find(shape: Shape, images: int, k, device: str, repetitions: int = 9, candidates: Mapping = CANDIDATES) -> Finding:
    """The fastest plan for a shape and so many images. ``k`` has the primitives of the backend that serves it
    otherwise."""
    case = Case(shape, images, device)
    best: dict[str, Tile] = {}
    for name in KERNELS:
        calls = {tile: call for tile in candidates[name] if (call := case.kernel(name, tile)) is not None}
        times = _seconds(calls, repetitions)
        if times:
            best[name] = min(times, key=times.get)
    forward, backward = (_seconds(case.ways(way, k, best), repetitions) for way in ("forward", "backward"))
    chosen = {}
    if _fastest(forward) == "fused":
        chosen |= {"first": best["first"], "second": best["second"]}
    if _fastest(backward) == "fused":
        chosen |= {"products": best["products"], "hidden": best["hidden"]}
    elif _fastest(backward) == "weight":
        chosen["weight"] = best["weight"]
    return Finding(Plan(**chosen, source="measured by tune"), forward, backward)


def _fastest(times: dict[str, float]) -> str:
    """The fastest way; the library unless another is clearly faster."""
    fastest = min(times, key=times.get)
    return fastest if times[fastest] < (1 - _MARGIN) * times["library"] else "library"
