"""The kernels on rows, the copies and the layout, and PyTorch's peers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import bytes_moved as moved
from .cases import ROW_TARGET, Case, StageShape

EPS = 1e-6


def norm_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    """LayerNorm and what contains it, on rows of the stage's width; and ``F.layer_norm``."""
    c, rows, label = shape.width, shape.rows, shape.label

    def forward(d, sets):
        w, b = d.parameters(c), d.parameters(c)
        return [lambda t=t: ops.layer_norm_forward.default(t, w, b, EPS) for t in d.features(sets, rows, c)]

    def backward(d, sets):
        w, mean, rstd = d.parameters(c), d.statistics(rows) - 1, d.statistics(rows)
        pairs = zip(d.features(sets, rows, c), d.features(sets, rows, c), strict=True)
        return [lambda g=g, t=t: ops.layer_norm_backward.default(g, t, mean, rstd, w) for g, t in pairs]

    def pointwise(d, sets):
        rstd = d.statistics(rows)
        pairs = zip(d.features(sets, rows, c), d.features(sets, rows, c), strict=True)
        return [lambda g=g, t=t: ops.normalized_backward_input.default(g, t, rstd) for g, t in pairs]

    def torch_forward(d, sets):
        w, b = (d.parameters(c).to(d.dtype) for _ in range(2))
        return [lambda t=t: F.layer_norm(t, (c,), w, b, EPS) for t in d.features(sets, rows, c)]

    def torch_backward(d, sets):
        w, b = (d.parameters(c).to(d.dtype) for _ in range(2))
        mean, rstd = (d.statistics(rows, 1) for _ in range(2))
        if d.device == "cpu":  # its kernel takes statistics of the input's dtype
            mean, rstd = mean.to(d.dtype), rstd.to(d.dtype)
        pairs = zip(d.features(sets, rows, c), d.features(sets, rows, c), strict=True)
        run = torch.ops.aten.native_layer_norm_backward.default
        return [lambda g=g, t=t: run(g, t, [c], mean, rstd, w, b, [True, True, True]) for g, t in pairs]

    cases = [
        Case(f"layer_norm_forward {label}", moved.layer_norm_forward(rows, c, itemsize), forward, ROW_TARGET),
        Case(f"layer_norm_backward {label}", moved.layer_norm_backward(rows, c, itemsize), backward, ROW_TARGET),
        Case(f"normalized_backward_input {label}", moved.normalized_backward(rows, c, itemsize), pointwise, ROW_TARGET),
        Case(
            f"torch layer_norm forward {label}", moved.layer_norm_forward(rows, c, itemsize), torch_forward, peer=True
        ),
        Case(
            f"torch layer_norm backward {label}",
            moved.layer_norm_backward(rows, c, itemsize),
            torch_backward,
            peer=True,
        ),
    ]
    cases += _layer_norm_grn_cases(ops, shape, itemsize)
    return cases + (_space_to_depth_cases(ops, shape, itemsize) if shape.side > 1 else [])


def _layer_norm_grn_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    c, rows, n, label = shape.width, shape.rows, shape.images, shape.label
    images = (None, 1, n)

    def forward(d, sets):
        parameters = [d.parameters(c) for _ in range(4)]
        run = ops.layer_norm_grn_forward.default
        return [lambda t=t: run(t, *parameters, *images, EPS, EPS) for t in d.features(sets, rows, c)]

    def backward(d, sets):
        mean, rstd, norm = d.statistics(rows) - 1, d.statistics(rows), d.statistics(n, c)
        parameters = [d.parameters(c) for _ in range(3)]
        run = ops.layer_norm_grn_backward.default
        pairs = zip(d.features(sets, rows, c), d.features(sets, rows, c), strict=True)
        return [lambda g=g, t=t: run(g, t, mean, rstd, *parameters, norm, *images, EPS) for g, t in pairs]

    # of 3 maps that two passes move the bound counts 2, and of 5 backward 3
    size = (rows, c, itemsize)
    return [
        Case(f"layer_norm_grn_forward {label}", moved.layer_norm_grn_forward(*size), forward, ROW_TARGET * 2 / 3),
        Case(f"layer_norm_grn_backward {label}", moved.layer_norm_grn_backward(*size), backward, ROW_TARGET * 3 / 5),
    ]


def _space_to_depth_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    c, rows, s, slots = shape.width, shape.rows, shape.side, shape.slots

    def forward(d, sets):
        w, b = d.parameters(c), d.parameters(c)
        return [
            lambda t=t: ops.space_to_depth_normalize.default(t, w, b, EPS) for t in d.features(sets, slots, s, s, c)
        ]

    def backward(d, sets):
        size = (sets, slots, s // 2, s // 2, 4 * c)
        w, rstd = d.parameters(c), d.statistics(slots, s, s)
        run = ops.space_to_depth_normalize_backward.default
        pairs = zip(d.features(*size), d.features(*size), strict=True)
        return [lambda g=g, z=z: run(g, z, rstd, w) for g, z in pairs]

    return [
        Case(f"space_to_depth {shape.label}", moved.space_to_depth(rows, c, itemsize), forward, ROW_TARGET),
        Case(
            f"space_to_depth_backward {shape.label}",
            moved.space_to_depth_backward(rows, c, itemsize),
            backward,
            ROW_TARGET,
        ),
    ]


def mlp_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    """GELU and GRN on the hidden rows, four times the width; and ``F.gelu``."""
    h, rows, n, label = 4 * shape.width, shape.rows, shape.images, shape.label
    segments = (None, 1, n)
    gelu_rows = (False, *segments)  # not the tanh form

    def features(d, sets, count):
        return zip(*(d.features(sets, rows, h) for _ in range(count)), strict=True)

    def statistics(d, sets):
        gamma = d.parameters(h)
        return [
            lambda a=a: ops.gelu_statistics.default(a, None, gamma, EPS, *gelu_rows) for (a,) in features(d, sets, 1)
        ]

    def statistics_h(d, sets):
        gamma = d.parameters(h)
        run = ops.gelu_statistics.default
        return [lambda a=a, o=o: run(a, o, gamma, EPS, *gelu_rows) for a, o in features(d, sets, 2)]

    def scale(d, sets):
        s = d.statistics(n, h)
        return [lambda a=a, o=o: ops.gelu_scale.default(a, o, s, *gelu_rows) for a, o in features(d, sets, 2)]

    def reduce(d, sets):
        norm, gamma = d.statistics(n, h), d.parameters(h)
        run = ops.mlp_backward_statistics.default
        return [lambda a=a, ds=ds: run(a, ds, None, norm, gamma, EPS, *gelu_rows) for a, ds in features(d, sets, 2)]

    def pointwise(d, sets):
        s, kappa = d.statistics(n, h), d.statistics(n, h)
        run = ops.mlp_backward_pointwise.default
        return [lambda a=a, ds=ds, o=o: run(a, ds, s, kappa, None, o, *gelu_rows) for a, ds, o in features(d, sets, 3)]

    def pointwise_hs(d, sets):
        s, kappa = d.statistics(n, h), d.statistics(n, h)
        run = ops.mlp_backward_pointwise.default
        quads = features(d, sets, 4)
        return [lambda a=a, ds=ds, o=o, hs=hs: run(a, ds, s, kappa, hs, o, *gelu_rows) for a, ds, o, hs in quads]

    def grn_forward(d, sets):
        gamma, beta = d.parameters(h), d.parameters(h)
        run = ops.grn_forward.default
        return [lambda a=a: run(a, gamma, beta, *segments, True, EPS) for (a,) in features(d, sets, 1)]

    def grn_backward(d, sets):
        gamma, norm = d.parameters(h), d.statistics(n, h)
        run = ops.grn_backward.default
        return [lambda g=g, a=a: run(g, a, gamma, norm, *segments, True, EPS) for g, a in features(d, sets, 2)]

    def column_sum(d, sets):
        return [lambda a=a: ops.column_sum.default(a) for (a,) in features(d, sets, 1)]

    def torch_gelu(d, sets):
        return [lambda a=a: F.gelu(a) for (a,) in features(d, sets, 1)]

    size = (rows, h, itemsize)
    return [
        Case(f"gelu_statistics {label}", moved.gelu_statistics(*size, False), statistics, ROW_TARGET),
        Case(f"gelu_statistics+h {label}", moved.gelu_statistics(*size, True), statistics_h, ROW_TARGET),
        Case(f"gelu_scale {label}", moved.gelu_scale(*size), scale, ROW_TARGET),
        Case(f"mlp_backward_statistics {label}", moved.mlp_backward_statistics(*size), reduce, ROW_TARGET),
        Case(f"mlp_backward_pointwise {label}", moved.mlp_backward_pointwise(*size, False), pointwise, ROW_TARGET),
        Case(f"mlp_backward_pointwise+hs {label}", moved.mlp_backward_pointwise(*size, True), pointwise_hs, ROW_TARGET),
        Case(f"gelu_grn_forward {label}", moved.grn_forward(*size), grn_forward),
        Case(f"gelu_grn_backward {label}", moved.grn_backward(*size), grn_backward),
        Case(f"column_sum {label}", moved.column_sum(*size), column_sum, ROW_TARGET),
        Case(f"torch gelu {label}", moved.gelu_scale(*size), torch_gelu, peer=True),
    ]


def copy_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    """Gather, scatter, the stem's pixels and the tables of a layout; of one stage's shape."""
    c, n, grid, s, label = shape.width, shape.images, shape.grid, shape.side, shape.label

    def gather(d, sets):
        where = d.layout(n, grid).patch_of_slot
        maps = d.features(sets, n, grid * s, grid * s, c)
        return [lambda t=t: ops.gather_patches.default(t, where, grid, grid) for t in maps]

    def scatter(d, sets):
        where = d.layout(n, grid).slot_of_patch
        maps = d.features(sets, shape.slots, s, s, c)
        return [lambda t=t: ops.scatter_patches.default(t, where, grid, grid, None) for t in maps]

    def put(d, sets):
        where, (out,) = d.layout(n, grid).patch_of_slot, d.features(1, n, grid * s, grid * s, c)
        return [lambda t=t: ops.put_patches.default(t, where, grid, grid, out) for t in packed(d, sets)]

    def packed(d, sets):
        return d.features(sets, shape.slots, s, s, c)

    def gather_norm(d, sets):
        where = d.layout(n, grid).patch_of_slot
        run = ops.gather_normalize.default
        return [
            lambda t=t: run(t, where, grid, grid, None, None, EPS) for t in d.features(sets, n, grid * s, grid * s, c)
        ]

    def put_norm(d, sets):
        where, (out,) = d.layout(n, grid).patch_of_slot, d.features(1, n, grid * s, grid * s, c)
        rstd, run = d.statistics(shape.slots, s, s), ops.normalized_backward_put.default
        pairs = zip(packed(d, sets), packed(d, sets), strict=True)
        return [lambda g=g, z=z: run(g, z, rstd, None, where, grid, grid, out) for g, z in pairs]

    def pixels(d, sets):
        where = d.layout(n, grid).patch_of_slot
        images = d.features(sets, n, 3, 4 * s * grid, 4 * s * grid)
        return [lambda t=t: ops.patch_pixels.default(t, where, grid, grid) for t in images]

    def layout(d, sets):
        ids = torch.rand(sets, n, grid * grid, device=d.device).argsort(-1)[..., : shape.kept].contiguous()
        return [lambda i=i: ops.layout_from_kept.default(i, grid, grid) for i in ids]

    def neighbours(radius):
        def make(d, sets):
            where = d.layout(n, grid)
            run = ops.neighbour_slots.default
            return [lambda: run(where.slot_of_patch, where.patch_of_slot, grid, grid, radius)] * sets

        return make

    tables = f"{shape.model} n{n} {grid}x{grid}"
    index = 4 * (shape.slots + n * grid**2)  # slot of each patch and patch of each slot, int32
    return [
        Case(f"gather {label}", moved.gather(shape.rows, c, itemsize), gather),
        Case(f"scatter {label}", moved.scatter(shape.rows, shape.all_rows, c, itemsize), scatter),
        Case(f"put {label}", moved.gather(shape.rows, c, itemsize), put),
        Case(f"gather_normalize {label}", moved.gather_normalize(shape.rows, c, itemsize), gather_norm, ROW_TARGET),
        Case(
            f"normalized_backward_put {label}", moved.normalized_backward(shape.rows, c, itemsize), put_norm, ROW_TARGET
        ),
        Case(f"patch_pixels {label}", moved.patch_pixels(shape.rows, 3, itemsize), pixels),
        Case(f"layout_from_kept {tables}", index + 8 * shape.slots, layout),
        *(
            Case(f"neighbour_slots r{r} {tables}", index + 4 * shape.slots * (2 * r + 1) ** 2, neighbours(r))
            for r in (1, 2, 3)
        ),
    ]
