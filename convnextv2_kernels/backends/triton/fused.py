"""The fused products in their order: the MLP's forward and backward where the plan of its shape says so.

Contracts in ``backends/reference/mlp.py``, kernels in ``products.py`` and ``products_backward.py``, choice in
``plans.py``. ``forward_by`` and ``backward_by`` take a plan, for ``tune`` and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import plans
from .gemm_backward import hidden_backward, image_products, weight_product
from .gemm_forward import first_product, second_product
from .gemm_tiles import MOST_IMAGES, Images, cut
from .launch import cdiv
from .mlp_rows import finish_statistics, mlp_backward_statistics
from .reduce import column_sum
from .weights import products_weight

# so many programs keep the largest GPU busy, and parts of fewer rows than this would be mostly sums to add
_PROGRAMS, _LEAST_ROWS = 512, 512


def plan_for(a: Tensor, width: int, hidden: int, out: int, images: Images) -> plans.Plan:
    """The plan for a chunk of ``a``'s rows."""
    rows = a.shape[0]
    if rows == 0 or images.count == 0:
        return plans.LIBRARY
    return plans.choose(plans.Shape(a.dtype, width, hidden, out, rows // images.count), a.device.index)


def fused_forward(
    y: Tensor, w1: Tensor, b1: Tensor, act: str, gamma: Tensor, eps: float, w2: Tensor, b2: Tensor,
    residual: Tensor | None, factors: Tensor | None, out_dtype: torch.dtype, keep_a: bool, images: tuple,
    one_segment: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """With the tiles of the plan; see :func:`forward_by`."""
    plan = plan_for(y, y.shape[1], w1.shape[0], w2.shape[0], Images(*images))
    arguments = (y, w1, b1, act, gamma, eps, w2, b2, residual, factors, out_dtype, keep_a, images, one_segment)
    return forward_by(plan, *arguments) if plan.forward_fused else None


def forward_by(
    plan: plans.Plan, y: Tensor, w1: Tensor, b1: Tensor, act: str, gamma: Tensor, eps: float, w2: Tensor, b2: Tensor,
    residual: Tensor | None, factors: Tensor | None, out_dtype: torch.dtype, keep_a: bool, images: tuple,
    one_segment: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """``fused_forward`` by a plan; None where a tile would span too many images."""
    images = Images(*images)
    rows, hidden, out_c = y.shape[0], w1.shape[0], w2.shape[0]
    first, second = (cut(rows, images, tile.rows) for tile in (plan.first, plan.second))
    if max(first.span, second.span) > MOST_IMAGES:
        return None
    a = y.new_empty(rows, hidden)
    squares = first_product(y, w1, b1, act, a, keep_a, first, images.count, plan.first)
    if one_segment:
        squares = squares.sum(0, keepdim=True)
    norm, scale = finish_statistics(squares.unsqueeze(1), gamma, eps)
    out = y.new_empty(rows, out_c, dtype=out_dtype)
    second_act = act if keep_a else "none"
    second_product(a, second_act, w2, b2, scale, residual, factors, out, second, images.count, plan.second)
    return out, norm, a if keep_a else None


def splits(rows: int, blocks: int) -> int:
    """Parts that rows are cut into in a product over them, which has so many blocks of results."""
    return max(1, min(_PROGRAMS // blocks, rows // _LEAST_ROWS))


def image_splits(rows: int, images: Images, one_segment: bool, blocks: int) -> int:
    """Parts of each image's rows: of their number alone, not of the images in the chunk. Few, as each has a G."""
    if one_segment:
        return splits(rows, blocks)
    return min(4, max(1, (images.rows_each(rows) or 0) // _LEAST_ROWS))


def fused_backward(
    a: Tensor, act: str, d: Tensor, d_sum: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, eps: float, w1: Tensor,
    w2: Tensor, z: Tensor | None, rstd: Tensor | None, images: tuple, one_segment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:  # fmt: skip
    """With the tiles of the plan; see :func:`backward_by`."""
    plan = plan_for(a, w1.shape[1], a.shape[1], d.shape[1], Images(*images))
    arguments = (a, act, d, d_sum, norm, gamma, beta, eps, w1, w2, z, rstd, images, one_segment)
    return backward_by(plan, *arguments) if plan.backward_fused else None


def backward_by(
    plan: plans.Plan, a: Tensor, act: str, d: Tensor, d_sum: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor,
    eps: float, w1: Tensor, w2: Tensor, z: Tensor | None, rstd: Tensor | None, images: tuple, one_segment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``fused_backward`` by a plan."""
    images = Images(*images)
    rows, hidden = a.shape
    segments = (None, 1, 1) if one_segment else images
    count = segments[2]
    parts = image_splits(rows, images, one_segment, cdiv(hidden, plan.products.columns))
    g, t = image_products(a, act, d, w2, *segments, parts, plan.products)
    t = t.sum(1) if parts > 1 else t.view(count, hidden)
    scale, kappa, dgamma = mlp_backward_statistics(None, None, t, norm, gamma, eps, act, *segments)
    by_part = scale.repeat_interleave(parts, 0) if parts > 1 else scale
    dw2 = products_weight(g.view(count * parts, hidden, -1).transpose(1, 2), by_part, d_sum, beta)
    del g
    tiles = cut(rows, images, plan.hidden.rows, allow_flat=False)
    da, dx, sums = hidden_backward(a, act, d, w1, w2, scale, kappa, z, rstd, tiles, images.count, plan.hidden)
    return da, dx, column_sum(sums), dgamma, dw2


def scaled_weight_grad(
    a: Tensor, act: str, d: Tensor, d_sum: Tensor, scale: Tensor, beta: Tensor, *segments
) -> Tensor | None:
    """``d' (act(a) scale + beta)`` in the statistics dtype, the scaled activations never stored; None: not fused."""
    images = Images(*segments)
    tile = plan_for(a, d.shape[1], a.shape[1], d.shape[1], images).weight
    return None if tile is None else weight_grad_by(tile)(a, act, d, d_sum, scale, beta, *images)


def weight_grad_by(tile: plans.Tile) -> Callable[..., Tensor]:
    """``scaled_weight_grad`` in a tile."""

    def weight_grad(a, act, d, d_sum, scale, beta, *segments):
        blocks = cdiv(d.shape[1], tile.rows) * cdiv(a.shape[1], tile.columns)
        parts = weight_product(a, act, d, scale, *segments, splits(a.shape[0], blocks), tile)
        return torch.addr(parts.sum(0), d_sum, beta)

    return weight_grad
