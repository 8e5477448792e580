"""Measures which GEMMs to fuse, and with which tiles, for shapes of the MLP on the current device.

Each fused kernel is timed with every candidate tile, then forward and backward as a whole against unfused GEMMs, all
interleaved so that drift affects all equally; the fastest becomes the plan of the shape (``plans.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from ...params import MLPGradRows, MLPOptions, MLPParams, MLPRows, Segments
from . import mlp, plans
from .availability import INTERPRETED
from .backend import FusedMLP
from .gemm_backward import hidden_backward, image_products, weight_product
from .gemm_forward import first_product, second_product
from .gemm_tiles import partition
from .plans import KERNELS, UNFUSED, Plan, Shape, Tile

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
_MARGIN = 0.03  # by which a variant must beat the vendor's GEMMs


class Finding(NamedTuple):
    """The plan of a shape and the seconds of all candidates: ``forward``, ``backward``, each by variant."""

    plan: Plan
    forward: dict[str, float]
    backward: dict[str, float]


class Case:
    """Tensors of a shape, and the calls to time."""

    def __init__(self, shape: Shape, images: int, device: str):
        self.shape = shape
        self.images = Segments(None, 1, images)
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

    @property
    def _rows(self) -> MLPRows:
        return MLPRows(self.y, self.residual, None, self.images, self.y.dtype)

    @property
    def _weights(self) -> MLPParams:
        return MLPParams(self.w1, self.b1, self.gamma, self.beta, self.w2, self.b2)

    @property
    def _options(self) -> MLPOptions:
        # the policy "hidden" is a GPU's default
        return MLPOptions("gelu", _EPS, False, "hidden", self.shape.dtype)

    @property
    def _chunk(self) -> MLPGradRows:
        return MLPGradRows(self.a, self.d, self.d_sum, self.norm, self.y, self.rstd, None, self.images, True)

    def kernel(self, name: str, tile: Tile) -> Callable[[], object] | None:
        """One fused kernel with a tile, or None if impossible."""
        s = self.shape
        rows = self.y.shape[0]
        if name in ("products", "hidden") and max(s.width, s.out) > 256:
            return None
        if name == "products":
            splits = mlp.image_splits(rows, self.images, False, -(-s.hidden // tile.columns))
            return lambda: image_products(self.a, "gelu", self.d, self.w2, self.images, splits, tile)
        if name == "weight":
            blocks = -(-s.out // tile.rows) * -(-s.hidden // tile.columns)
            splits = mlp.splits(rows, blocks)
            return lambda: weight_product(self.a, "gelu", self.d, self.scale, self.images, splits, tile)
        tiles = partition(rows, self.images, tile.rows, allow_flat=name != "hidden")
        if tiles.span > mlp.MOST_IMAGES:
            return None
        if name == "first":
            out = torch.empty_like(self.a)
            return lambda: first_product(self._rows, self._weights, "gelu", out, True, tiles, tile)
        if name == "second":
            return lambda: second_product(self.a, "gelu", self._weights, self.scale, self._rows, tiles, tile)
        scales = self.scale, self.scale
        return lambda: hidden_backward(self._chunk, self._weights, "gelu", scales, tiles, tile)

    def forward(self, backend: FusedMLP, plan: Plan) -> Callable[[], object]:
        """The whole forward by a plan."""

        def run():
            with plans.using(plan):
                return backend.mlp_forward(self._rows, self._weights, self._options)

        return run

    def backward(self, backend: FusedMLP, plan: Plan) -> Callable[[], object]:
        """The whole backward by a plan, up to the gradient of the convolution's output."""

        def run():
            with plans.using(plan):
                return backend.mlp_backward(self._chunk, self._weights, self._options)

        return run

    def variants(self, direction: str, backend: FusedMLP, tiles: Mapping[str, Tile]) -> dict[str, Callable[[], object]]:
        """The whole forward or backward with vendor GEMMs ("library") and in each fused form that has its tiles."""
        can = {name for name, tile in tiles.items() if self.kernel(name, tile) is not None}
        if direction == "forward":
            found = {"library": self.forward(backend, UNFUSED)}
            if {"first", "second"} <= can:
                found["fused"] = self.forward(backend, Plan(first=tiles["first"], second=tiles["second"]))
            return found
        found = {"library": self.backward(backend, UNFUSED)}
        if {"products", "hidden"} <= can:
            found["fused"] = self.backward(backend, Plan(products=tiles["products"], hidden=tiles["hidden"]))
        # where the unfused form does not compute the weight's gradient by a GEMM per image
        if "weight" in can and self.shape.rows_each <= 2 * self.shape.out:
            found["weight"] = self.backward(backend, Plan(weight=tiles["weight"]))
        return found


def _seconds(functions: Mapping, repetitions: int) -> dict:
    """Median seconds of each call, interleaved; calls that exceed the GPU's memory or fail to compile are skipped."""
    ready = {}
    for key, function in functions.items():
        try:
            function()
            ready[key] = _repeated(function)
        except (OutOfResources, CompilationError, torch.OutOfMemoryError):
            continue
    samples: dict[Any, list[float]] = {key: [] for key in ready}
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


def find(
    shape: Shape, images: int, backend: FusedMLP, device: str, repetitions: int = 9, candidates: Mapping = CANDIDATES
) -> Finding:
    """The fastest plan for a shape and so many images, with the other kernels of a backend."""
    case = Case(shape, images, device)
    best: dict[str, Tile] = {}
    for name in KERNELS:
        calls = {tile: call for tile in candidates[name] if (call := case.kernel(name, tile)) is not None}
        times = _seconds(calls, repetitions)
        if times:
            best[name] = min(times, key=times.__getitem__)
    forward, backward = (_seconds(case.variants(way, backend, best), repetitions) for way in ("forward", "backward"))
    chosen: dict[str, Any] = {}
    if _fastest(forward) == "fused":
        chosen |= {"first": best["first"], "second": best["second"]}
    if _fastest(backward) == "fused":
        chosen |= {"products": best["products"], "hidden": best["hidden"]}
    elif _fastest(backward) == "weight":
        chosen["weight"] = best["weight"]
    return Finding(Plan(**chosen, source="measured by tune"), forward, backward)


def _fastest(times: dict[str, float]) -> str:
    """The fastest variant; the vendor's unless another is clearly faster."""
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < (1 - _MARGIN) * times["library"] else "library"
