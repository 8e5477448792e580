"""A call of every operator the package registers, the building blocks below the public ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convnextv2_kernels import schedule
from convnextv2_kernels.backends import cuda

from .backends import F32, F64, Backend
from .layouts import make_layout

NAMESPACE = "convnextv2_kernels"
EPS = 1e-6


def registered() -> list[str]:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")}
    return sorted(name.removeprefix(f"{NAMESPACE}::").split(".")[0] for name in names)


class Sizes(NamedTuple):
    """Patch side, channels, kernel size, hidden width, output width."""

    s: int
    c: int
    k: int
    h: int
    o: int


SMALL = Sizes(2, 5, 3, 7, 3)
LARGE = Sizes(8, 40, 7, 70, 24)


class Draw:
    """Arguments of the operators: features of a dtype, parameters of its statistics dtype, layouts."""

    def __init__(self, dtype: torch.dtype, device: str, optional: bool, backend: str, sizes: Sizes = SMALL):
        self.policy = schedule.save_policy(device)
        self.s, self.c, self.k, self.h, self.o = sizes
        self.dtype, self.device, self.optional, self.backend = dtype, device, optional, backend
        self.statistics = torch.float64 if dtype == F64 else torch.float32
        self.generator = torch.Generator().manual_seed(0)
        # the optional offsets and neighbours come and go with the other optional arguments
        self.layout = make_layout("ragged", device)
        self.images, self.patches = self.layout.num_images, self.layout.num_patches
        self.rows = self.patches * self.s**2
        if not optional:
            self.images, self.rows = 3, 3 * self.s**2

    def features(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def stat(self, *shape: int, positive: bool = False) -> Tensor:
        t = torch.randn(shape, generator=self.generator).to(self.device, self.statistics)
        return t.abs() + 0.1 if positive else t

    def maybe(self, t):
        return t if self.optional else None

    @property
    def map(self) -> tuple[int, ...]:
        return (self.patches if self.optional else 3, self.s, self.s)

    def x(self, c: int | None = None) -> Tensor:
        return self.features(*self.map, c or self.c)

    @property
    def neighbours(self) -> Tensor | None:
        return self.maybe(self.layout.neighbour_slots(1))

    @property
    def segments(self) -> tuple:
        return self.maybe(self.layout.image_offsets), self.s**2 if self.optional else 1, self.images

    @property
    def geometry(self) -> tuple:
        act = "gelu_tanh" if self.optional else "gelu"
        return self.s**2, self.images, False, act, EPS, self.policy, self.dtype, self.backend

    @property
    def whole_map(self) -> tuple[int, ...]:
        """The dense map of the layout, and its table and grid."""
        return (3, 3 * self.s, 3 * self.s, self.c)

    @property
    def places(self) -> tuple:
        return self.layout.patch_of_slot, *self.layout.grid

    @property
    def packed(self) -> tuple[int, ...]:
        return (self.patches, self.s, self.s)

    @property
    def gathered(self) -> tuple:
        act = "gelu_tanh" if self.optional else "gelu"
        return *self.layout.grid, False, act, EPS, EPS, self.dtype, self.backend

    def mlp(self, out_c: int) -> tuple:
        f, h = self.features, self.h
        return f(h, self.c), f(h), f(1, 1, 1, h), f(1, 1, 1, h), f(out_c, h)

    def drop_path(self) -> Tensor | None:
        return self.maybe(self.features(self.images))

    @property
    def offsets(self) -> Tensor | None:
        return self.segments[0]


def _mlp_state(d: Draw) -> tuple[Tensor, Tensor]:
    """GRN's norms and the hidden activations."""
    return d.stat(d.images, d.h, positive=True), d.features(d.rows if d.policy == "hidden" else 0, d.h)


def _block_state(d: Draw) -> tuple[Tensor, ...]:
    """Normalised rows and 1/std, and those of the MLP."""
    rows = (d.features(0), d.stat(0)) if d.policy == "inputs" else (d.x(), d.stat(*d.map, positive=True))
    return *rows, *_mlp_state(d)


def _block(d: Draw) -> tuple:
    return d.features(d.c, 1, d.k, d.k), d.maybe(d.features(d.c)), d.features(d.c), d.features(d.c), *d.mlp(d.c)


def _block_index(d: Draw) -> tuple:
    return d.neighbours, d.drop_path(), d.offsets


SAMPLES = {
    "depthwise_conv_forward": lambda d: (
        d.x(),
        d.stat(d.c, 1, d.k, d.k),
        d.maybe(d.stat(d.c)),
        d.maybe(d.x()),
        d.neighbours,
        d.optional,
    ),
    "depthwise_conv_normalize": lambda d: (
        d.x(),
        d.stat(d.c, 1, d.k, d.k),
        d.maybe(d.stat(d.c)),
        d.neighbours,
        *(d.maybe(d.stat(d.c)) for _ in range(2)),
        EPS,
    ),
    "depthwise_conv_backward_weight": lambda d: (d.x(), d.x(), d.neighbours, d.k),
    "layer_norm_forward": lambda d: (d.x(), d.maybe(d.stat(d.c)), d.maybe(d.stat(d.c)), EPS),
    "layer_norm_backward": lambda d: (d.x(), d.x(), d.stat(*d.map), d.stat(*d.map), d.maybe(d.stat(d.c))),
    "normalized_backward": lambda d: (d.x(), d.x(), d.stat(*d.map), d.stat(d.c)),
    "space_to_depth_normalize": lambda d: (d.x(), d.maybe(d.stat(d.c)), d.maybe(d.stat(d.c)), EPS),
    "space_to_depth_normalize_backward": lambda d: (
        *(d.features(d.map[0], d.s // 2, d.s // 2, 4 * d.c) for _ in range(2)),
        d.stat(*d.map),
        d.stat(d.c),
    ),
    "grn_forward": lambda d: (d.x(), d.stat(d.c), d.stat(d.c), *d.segments, d.optional, EPS),
    "grn_backward": lambda d: (
        d.x(),
        d.x(),
        d.stat(d.c),
        d.stat(d.images, d.c, positive=True),
        *d.segments,
        d.optional,
        EPS,
    ),
    "layer_norm_grn_forward": lambda d: (d.x(), *(d.stat(d.c) for _ in range(4)), *d.segments, EPS, EPS),
    "layer_norm_grn_backward": lambda d: (
        d.x(),
        d.x(),
        d.stat(*d.map),
        d.stat(*d.map, positive=True),
        *(d.stat(d.c) for _ in range(3)),
        d.stat(d.images, d.c, positive=True),
        *d.segments,
        EPS,
    ),
    "column_sum": lambda d: (d.features(d.rows, d.h),),
    "transpose_rows": lambda d: (d.features(d.rows, d.h),),
    "gather_patches": lambda d: (d.features(3, 3 * d.s, 3 * d.s, d.c), d.layout.patch_of_slot, 3, 3),
    "scatter_patches": lambda d: (
        d.features(d.patches, d.s, d.s, d.c),
        d.layout.slot_of_patch,
        3,
        3,
        d.maybe(d.features(d.c)),
    ),
    "gather_normalize": lambda d: (d.features(*d.whole_map), *d.places, *(d.maybe(d.stat(d.c)) for _ in range(2)), EPS),
    "normalized_backward_put": lambda d: (
        *(d.features(*d.packed, d.c) for _ in range(2)),
        d.stat(*d.packed),
        d.maybe(d.stat(d.c)),
        *d.places,
        d.features(*d.whole_map),
    ),
    "put_patches": lambda d: (d.features(*d.packed, d.c), *d.places, d.features(*d.whole_map)),
    "patch_pixels": lambda d: (
        d.features(3, 2, 12 * d.s, 12 * d.s),
        *((d.layout.patch_of_slot, 3, 3) if d.optional else (None, 3 * d.s, 3 * d.s)),
    ),
    "gelu_statistics": lambda d: (
        d.features(d.rows, d.h),
        d.maybe(d.features(d.rows, d.h)),
        d.stat(d.h),
        EPS,
        d.optional,
        *d.segments,
    ),
    "gelu_scale": lambda d: (
        *(d.features(d.rows, d.h) for _ in range(2)),
        d.maybe(d.stat(d.images, d.h)),
        d.optional,
        *d.segments,
        d.maybe(d.stat(d.h)),
        not d.optional,
    ),
    "mlp_backward_statistics": lambda d: (
        *(d.maybe(d.features(d.rows, d.h)) for _ in range(2)),
        None if d.optional else d.stat(d.images, d.h),
        d.stat(d.images, d.h, positive=True),
        d.stat(d.h),
        EPS,
        d.optional,
        *d.segments,
    ),
    "mlp_backward_pointwise": lambda d: (
        *(d.features(d.rows, d.h) for _ in range(2)),
        *(d.stat(d.images, d.h) for _ in range(2)),
        d.maybe(d.features(d.rows, d.h)),
        d.features(d.rows, d.h),
        d.optional,
        *d.segments,
        d.maybe(d.stat(d.h)),
    ),
    "mlp_parameters": lambda d: (
        d.stat(d.h, d.c) if d.optional else d.features(d.h, d.c),
        d.stat(d.h),
        d.stat(d.o, d.h) if d.optional else d.features(d.o, d.h),
        d.maybe(d.stat(d.o)),
        d.stat(d.h),
        d.maybe(d.stat(d.c)),
        d.maybe(d.stat(d.c)),
        d.features(1),
    ),
    "unfold_layer_norm": lambda d: (d.features(d.h, d.c), d.stat(d.c), d.stat(d.c), d.stat(d.h), d.stat(d.h, d.c)),
    "products_reduce": lambda d: (d.stat(d.images, d.o, d.h), d.features(d.o, d.h)),
    "products_weight": lambda d: (d.stat(d.images, d.o, d.h), d.stat(d.images, d.h), d.stat(d.o), d.stat(d.h)),
    "normalized_backward_input": lambda d: (d.x(), d.x(), d.stat(*d.map, positive=True)),
    "layout_from_kept": lambda d: (torch.tensor([[3, 0], [2, 5]], device=d.device), 2, 3),
    "neighbour_slots": lambda d: (d.layout.slot_of_patch, d.layout.patch_of_slot, *d.layout.grid, 2),
    "product": lambda d: (d.features(6, d.c), d.features(d.h, d.c), d.maybe(d.features(d.h)), d.backend),
    "product_input_grad": lambda d: (d.features(6, d.h), d.features(d.h, d.c), d.backend),
    "product_weight_grad": lambda d: (d.features(40, d.h), d.features(40, d.c), d.backend),
    "mlp_forward": lambda d: (
        d.x(),
        *d.mlp(d.o),
        d.features(d.o),
        d.maybe(d.x(d.o)),
        d.drop_path(),
        d.offsets,
        *d.geometry,
    ),
    "mlp_backward": lambda d: (d.x(d.o), d.x(), *d.mlp(d.o), d.drop_path(), d.offsets, *_mlp_state(d), *d.geometry),
    "gathered_mlp_forward": lambda d: (
        d.features(*d.whole_map),
        *d.mlp(d.o),
        d.features(d.o),
        *(d.maybe(d.features(d.c)) for _ in range(2)),
        d.maybe(d.features(*d.packed, d.o)),
        d.maybe(d.features(3)),
        d.layout.patch_of_slot,
        d.layout.image_offsets,
        *d.gathered,
    ),
    "gathered_mlp_backward": lambda d: (
        d.features(*d.packed, d.o),
        d.features(*d.whole_map),
        *d.mlp(d.o),
        *(d.maybe(d.features(d.c)) for _ in range(2)),
        d.maybe(d.features(3)),
        d.layout.patch_of_slot,
        d.layout.image_offsets,
        d.stat(3, d.h, positive=True),
        *d.gathered,
    ),
    "block_forward": lambda d: (d.x(), *_block(d), d.features(d.c), *_block_index(d), EPS, *d.geometry),
    "block_backward": lambda d: (d.x(), d.x(), *_block_state(d), *_block(d), *_block_index(d), EPS, *d.geometry),
}

# operators that only one backend has, or more than one but not all
CPU_ONLY = ("transpose_rows",)
# not of Triton
ROW_PASSES = ("gelu_statistics", "gelu_scale", "mlp_backward_statistics", "mlp_backward_pointwise")
MAP_PASSES = ("gather_normalize", "normalized_backward_put", "put_patches")
CUDA_ONLY = (
    "mlp_parameters",
    "unfold_layer_norm",
    "products_reduce",
    "products_weight",
    "normalized_backward_input",
    "layout_from_kept",
    "neighbour_slots",
)


def names_on(backend: Backend) -> list[str]:
    """The operators a backend has."""
    not_of_triton = (*CPU_ONLY, *CUDA_ONLY, *ROW_PASSES, *MAP_PASSES)
    absent = {"cpu": CUDA_ONLY, "cuda": CPU_ONLY, "triton": not_of_triton}[backend.name]
    return [name for name in SAMPLES if name not in absent]


def operator(name: str, backend: Backend):
    """The operator that serves a backend; emulated CUDA kernels and those of Triton have namespaces of their own."""
    own = {"cuda": cuda.CUDABackend.namespace, "triton": f"{NAMESPACE}_triton"}
    namespace = NAMESPACE if name in COMPOSITE else own.get(backend.name, NAMESPACE)
    return getattr(getattr(torch.ops, namespace), name).default


# operators that serve fewer dtypes than their backend
ONLY = {"transpose_rows": (F32,)}

# The operators of ops/_operators.py, which call others. They all contain matrix products: see WITH_PRODUCTS.
COMPOSITE = (
    "product",
    "product_input_grad",
    "product_weight_grad",
    "mlp_forward",
    "mlp_backward",
    "gathered_mlp_forward",
    "gathered_mlp_backward",
    "block_forward",
    "block_backward",
)

# What a vendor's matrix product has a part in: its bits may depend on threads and strides.
WITH_PRODUCTS = (
    "linear",
    "patch_embed",
    "patch_embed_layer_norm",
    "downsample",
    "pointwise_mlp",
    "gathered_pointwise_mlp",
    "convnextv2_block",
)
