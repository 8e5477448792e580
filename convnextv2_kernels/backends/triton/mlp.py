"""The MLP of a chunk with fused GEMMs, forward and backward, for shapes whose plan fuses them.

Kernels in ``gemm_forward.py`` and ``gemm_backward.py``, the choice in ``plans.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...params import WHOLE_BATCH, MLPGradResult, MLPGradRows, MLPOptions, MLPParams, MLPResult, MLPRows, Segments
from . import plans
from .gemm_backward import hidden_backward, image_products, weight_product
from .gemm_forward import first_product, second_product
from .gemm_tiles import MOST_IMAGES, partition
from .launch import cdiv
from .mlp_rows import finish_statistics, mlp_backward_statistics
from .reduce import column_sum
from .weights import products_weight

Result = TypeVar("Result")
# programs that keep the largest GPU busy; parts of fewer rows would mostly consist of sums to add
_PROGRAMS, _LEAST_ROWS = 512, 512


def shape_of(rows: int, dtype: torch.dtype, widths: tuple[int, int, int], images: Segments) -> plans.Shape | None:
    """What the plan for the rows of a chunk depends on, ``widths`` those of the MLP; None where there are no rows."""
    if rows == 0 or images.count == 0:
        return None
    return plans.Shape(dtype, *widths, rows // images.count)


def by_plan(shape: plans.Shape | None, index: int | None, run: Callable[[plans.Plan], Result]) -> Result:
    """``run`` with the plan of a shape; once more with another plan where the GPU cannot hold the tiles of a measured
    one, which the kernels say before they begin."""
    if shape is None:
        return run(plans.UNFUSED)
    try:
        return run(plans.choose(shape, index))
    except OutOfResources as error:
        if not plans.reject(shape, index, error):
            raise
    return run(plans.choose(shape, index))


def fused_forward(rows: MLPRows, weights: MLPParams, options: MLPOptions, plan: plans.Plan) -> MLPResult | None:
    """``KernelBackend.mlp_forward`` with the tiles of a plan; None if a tile would span too many images."""
    assert plan.first is not None and plan.second is not None
    first, second = (partition(rows.total, rows.images, tile.rows) for tile in (plan.first, plan.second))
    if max(first.span, second.span) > MOST_IMAGES:
        return None
    saved = options.save == "hidden"
    a = rows.hidden
    if a is None:
        a = weights.w1.new_empty(rows.total, weights.w1.shape[0])
    squares = first_product(rows, weights, options.act, a, saved, first, plan.first)
    if options.batch_scope:
        squares = squares.sum(0, keepdim=True)
    norm, scale = finish_statistics(squares.unsqueeze(1), weights.gamma, options.eps)
    out = second_product(a, options.act if saved else "none", weights, scale, rows, second, plan.second)
    return MLPResult(out, norm, a if saved else None)


def splits(rows: int, blocks: int) -> int:
    """Number of parts of the rows in a GEMM that sums over them and has this many blocks of results."""
    return max(1, min(_PROGRAMS // blocks, rows // _LEAST_ROWS))


def image_splits(rows: int, images: Segments, one_segment: bool, blocks: int) -> int:
    """Number of parts of each image's rows: depends on their number, not on the chunk. Few, as each has a G."""
    if one_segment:
        return splits(rows, blocks)
    return min(4, max(1, (images.rows_each(rows) or 0) // _LEAST_ROWS))


def fused_backward(chunk: MLPGradRows, weights: MLPParams, options: MLPOptions, plan: plans.Plan) -> MLPGradResult:
    """``KernelBackend.mlp_backward`` with the tiles of a plan."""
    a, d, act, images = chunk.a, chunk.d, options.act, chunk.images
    assert plan.products is not None and plan.hidden is not None
    rows, hidden = a.shape
    segments = WHOLE_BATCH if options.batch_scope else images
    count = segments.count
    parts = image_splits(rows, images, options.batch_scope, cdiv(hidden, plan.products.columns))
    g, t = image_products(a, act, d, weights.w2, segments, parts, plan.products)
    t = t.sum(1) if parts > 1 else t.view(count, hidden)
    scale, kappa, dgamma = mlp_backward_statistics(None, None, t, chunk.norm, weights.gamma, options.eps, act, segments)
    by_part = scale.repeat_interleave(parts, 0) if parts > 1 else scale
    dw2 = products_weight(g.view(count * parts, hidden, -1).transpose(1, 2), by_part, chunk.d_sum, weights.beta)
    del g
    tiles = partition(rows, images, plan.hidden.rows, allow_flat=False)
    da, dx, sums = hidden_backward(chunk, weights, act, (scale, kappa), tiles, plan.hidden)
    return MLPGradResult(da, dx if chunk.places is None else None, column_sum(sums), dgamma, dw2)


def weight_grad(chunk: MLPGradRows, scale: Tensor, beta: Tensor, options: MLPOptions, tile: plans.Tile) -> Tensor:
    """``d' (act(a) scale + beta)`` in the statistics dtype, without storing the scaled activations."""
    a, d = chunk.a, chunk.d
    blocks = cdiv(d.shape[1], tile.rows) * cdiv(a.shape[1], tile.columns)
    segments = options.segments(chunk.images)
    parts = weight_product(a, options.act, d, scale, segments, splits(a.shape[0], blocks), tile)
    return torch.addr(parts.sum(0), chunk.d_sum, beta)
