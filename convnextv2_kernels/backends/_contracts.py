"""What operators that are written in Python accept, as ``csrc/torch/binding.h`` says it for those in C++.

Anyone can call an operator: everything is checked before a kernel sees it. Index tables are looked at where that costs
nothing, on a CPU; on a GPU with ``TRITON_DEBUG=1`` assertions on the device look at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..dtypes import FLOAT_DTYPES, statistics_dtype

_INT32_MAX = 2**31 - 1


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(f"convnextv2_kernels: {text}")


def _dense(t: Tensor, name: str, like: Tensor | None = None) -> None:
    ok = t.layout is torch.strided and not t.is_nested and t.is_contiguous() and not t.is_neg()
    # a freed storage leaves sizes without data
    ok = ok and (t.numel() == 0 or t.data_ptr() != 0) and (like is None or t.device == like.device)
    expect(ok, f"{name} must be contiguous and on the device of the features")


def rows(t: Tensor, name: str, dim: int | None = None) -> int:
    """Number of rows of ``t [..., C]``."""
    _dense(t, name)
    expect(t.dtype in FLOAT_DTYPES, f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
    expect(t.dim() >= 1 and t.shape[-1] >= 1, f"{name} must be [..., C] with C >= 1, got {list(t.shape)}")
    expect(dim is None or t.dim() == dim, f"{name} must have {dim} dimensions, got {list(t.shape)}")
    return t.numel() // t.shape[-1]


def like(t: Tensor, x: Tensor, name: str) -> None:
    _dense(t, name, x)
    expect(t.dtype == x.dtype and t.numel() == x.numel(), f"{name} must have the dtype and size of the features")


def statistic(t: Tensor | None, x: Tensor, numel: int, name: str) -> None:
    if t is None:
        return
    _dense(t, name, x)
    ok = t.dtype == statistics_dtype(x.dtype) and t.numel() == numel
    expect(ok, f"{name} must hold {numel} values of the statistics dtype")


def check_eps(eps: float, name: str = "eps") -> None:
    expect(0 <= eps < math.inf, f"{name} must be a finite number >= 0, got {eps!r}")


def table(t: Tensor | None, x: Tensor, shape: tuple[int, int, int], name: str) -> None:
    """``shape``: number of entries, the lowest and the highest index."""
    if t is None:
        return
    numel, low, high = shape
    _dense(t, name, x)
    expect(t.dtype == torch.int32 and t.numel() == numel, f"{name} must be int32 with {numel} elements")
    if numel and t.device.type == "cpu":
        least, most = int(t.min()), int(t.max())
        expect(low <= least and most <= high, f"{name} holds {least} to {most}, expected indices from {low} to {high}")
    elif numel and t.is_cuda and _debug():
        torch._assert_async(((t >= low) & (t <= high)).all(), f"{name} must hold indices from {low} to {high}")


def segments(
    offsets: Tensor | None, x: Tensor, total: int, rows_per_slot: int, count: int, name: str = "segments"
) -> None:
    """The segments hold all of ``total`` rows."""
    expect(0 <= count < _INT32_MAX, f"{name} must be from 0 to {_INT32_MAX - 1}, got {count}")
    fits = rows_per_slot >= 1 and (offsets is None or total % rows_per_slot == 0)
    expect(fits, f"rows_per_slot must divide the {total} rows, got {rows_per_slot}")
    if offsets is None:
        expect(total % count == 0 if count else total == 0, f"{name} must divide the {total} rows, got {count}")
        return
    table(offsets, x, (count + 1, 0, _INT32_MAX), "offsets")
    slots = total // rows_per_slot
    if offsets.device.type == "cpu":
        steps = offsets.long().diff()
        expect(count == 0 or int(steps.min()) >= 0, "offsets must rise")
        spans = int(steps.sum())
        expect(spans == slots, f"offsets must span the {slots} slots of the rows, got {spans}")
    elif offsets.is_cuda and _debug():
        steps = offsets.long().diff()
        torch._assert_async((steps >= 0).all() & (steps.sum() == slots), f"offsets must rise by {slots} in all")


def _debug() -> bool:
    import triton

    return bool(triton.knobs.runtime.debug)


def _grid(images: int, grid_h: int, grid_w: int) -> int:
    """Number of patches."""
    for name, side in (("grid_h", grid_h), ("grid_w", grid_w)):
        expect(1 <= side <= _INT32_MAX, f"{name} must be from 1 to {_INT32_MAX}, got {side}")
    count = images * grid_h * grid_w
    expect(count <= _INT32_MAX, f"the number of patches must be from 0 to {_INT32_MAX}, got {count}")
    return count


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_eps(eps)
    statistic(weight, x, x.shape[-1], "weight")
    statistic(bias, x, x.shape[-1], "bias")


def _conv(x: Tensor, neighbours: Tensor | None, kernel_size: int) -> None:
    rows(x, "x", 4)
    maps, height, width, _ = x.shape
    expect(height >= 1 and width >= 1, f"x must be [maps, H, W, C] with H and W >= 1, got {list(x.shape)}")
    odd = kernel_size % 2 == 1 and 3 <= kernel_size <= 11
    expect(odd, f"kernel size must be odd, from 3 to 11, got {kernel_size}")
    if neighbours is not None:
        expect(height == width, f"packed patches must be square, got {height}x{width}")
        window = 2 * -(-(kernel_size // 2) // height) + 1
        table(neighbours, x, (maps * window**2, -1, maps - 1), "neighbours")


def _conv_forward(x, weight, bias, neighbours) -> None:
    _conv(x, neighbours, weight.shape[-1] if weight.dim() else 0)
    statistic(weight, x, x.shape[-1] * weight.shape[-1] ** 2, "weight")
    statistic(bias, x, x.shape[-1], "bias")


# the operators of ``backends/triton``, by name, with their arguments
def depthwise_conv_forward(x, weight, bias, residual, neighbours, flip):
    _conv_forward(x, weight, bias, neighbours)
    if residual is not None:
        like(residual, x, "residual")


def depthwise_conv_normalize(x, weight, bias, neighbours, ln_weight, ln_bias, eps):
    _conv_forward(x, weight, bias, neighbours)
    _norm(x, ln_weight, ln_bias, eps)


def depthwise_conv_backward_weight(grad, x, neighbours, kernel_size):
    _conv(x, neighbours, kernel_size)
    like(grad, x, "grad")


def layer_norm_forward(x, weight, bias, eps):
    rows(x, "x")
    _norm(x, weight, bias, eps)


def layer_norm_backward(grad, x, mean, rstd, weight):
    count = rows(x, "x")
    like(grad, x, "grad")
    statistic(mean, x, count, "mean")
    statistic(rstd, x, count, "rstd")
    statistic(weight, x, x.shape[-1], "weight")


def normalized_backward(dy, z, rstd, weight):
    layer_norm_backward(dy, z, None, rstd, weight)


def _even(t: Tensor, name: str, dim: int) -> None:
    ok = t.dim() == dim and t.shape[1] % 2 == 0 and t.shape[2] % 2 == 0
    expect(ok, f"{name} must be [maps, h, w{', C' if dim == 4 else ''}] with even h and w, got {list(t.shape)}")


def space_to_depth_normalize(x, weight, bias, eps):
    rows(x, "x")
    _even(x, "x", 4)
    _norm(x, weight, bias, eps)


def space_to_depth_normalize_backward(dy, z, rstd, weight):
    count = rows(z, "z")
    like(dy, z, "dy")
    expect(z.shape[-1] % 4 == 0, f"z must be [maps, h / 2, w / 2, 4 C], got {list(z.shape)}")
    _even(rstd, "rstd", 3)
    statistic(rstd, z, 4 * count, "rstd")
    statistic(weight, z, z.shape[-1] // 4, "weight")


def grn_forward(x, gamma, beta, offsets, rows_per_slot, segments_, gelu, eps):
    segments(offsets, x, rows(x, "x"), rows_per_slot, segments_)
    check_eps(eps)
    statistic(gamma, x, x.shape[-1], "gamma")
    statistic(beta, x, x.shape[-1], "beta")


def grn_backward(grad, x, gamma, norm, *settings):
    offsets, rows_per_slot, segments_, _gelu, eps = settings
    segments(offsets, x, rows(x, "x"), rows_per_slot, segments_)
    check_eps(eps)
    like(grad, x, "grad")
    statistic(gamma, x, x.shape[-1], "gamma")
    statistic(norm, x, segments_ * x.shape[-1], "norm")


def layer_norm_grn_forward(x, ln_weight, ln_bias, gamma, beta, *settings):
    offsets, rows_per_slot, segments_, ln_eps, eps = settings
    segments(offsets, x, rows(x, "x"), rows_per_slot, segments_)
    check_eps(ln_eps, "ln_eps")
    check_eps(eps)
    for name, t in (("ln_weight", ln_weight), ("ln_bias", ln_bias), ("gamma", gamma), ("beta", beta)):
        statistic(t, x, x.shape[-1], name)


def layer_norm_grn_backward(grad, x, mean, rstd, ln_weight, ln_bias, *rest):
    gamma, norm, offsets, rows_per_slot, segments_, eps = rest
    count = rows(x, "x")
    segments(offsets, x, count, rows_per_slot, segments_)
    check_eps(eps)
    like(grad, x, "grad")
    statistic(mean, x, count, "mean")
    statistic(rstd, x, count, "rstd")
    for name, t in (("ln_weight", ln_weight), ("ln_bias", ln_bias), ("gamma", gamma)):
        statistic(t, x, x.shape[-1], name)
    statistic(norm, x, segments_ * x.shape[-1], "norm")


def column_sum(x):
    rows(x, "x", 2)


def gather_patches(x, patch_of_slot, grid_h, grid_w):
    _dense(x, "x")
    expect(x.dim() == 4, f"x must be [N, Gh s, Gw s, C], got {list(x.shape)}")
    patches, (height, width) = _grid(x.shape[0], grid_h, grid_w), x.shape[1:3]
    fits = height % grid_h == 0 and width == grid_w * (height // grid_h)
    expect(fits, f"x is {height}x{width} pixels, expected {grid_h}s x {grid_w}s")
    expect(patch_of_slot.dim() == 1, f"patch_of_slot must be [P], got {list(patch_of_slot.shape)}")
    table(patch_of_slot, x, (patch_of_slot.numel(), 0, patches - 1), "patch_of_slot")


def scatter_patches(x, slot_of_patch, grid_h, grid_w, fill):
    _dense(x, "x")
    square = x.dim() == 4 and x.shape[1] == x.shape[2]
    expect(square, f"x must be packed patches [P, s, s, C], got {list(x.shape)}")
    expect(slot_of_patch.dim() >= 1, "slot_of_patch must be [N, Gh Gw]")
    patches = _grid(slot_of_patch.shape[0], grid_h, grid_w)
    table(slot_of_patch, x, (patches, -1, x.shape[0] - 1), "slot_of_patch")
    if fill is not None:
        _dense(fill, "fill", x)
        expect(fill.numel() == x.shape[-1] and fill.dtype == x.dtype, "fill must hold C values of x's dtype")


def patch_pixels(images, patch_of_slot, grid_h, grid_w):
    _dense(images, "images")
    expect(images.dim() == 4, f"images must be [N, C, H, W], got {list(images.shape)}")
    n, _, height, width = images.shape
    patches, side = _grid(n, grid_h, grid_w), height // (4 * grid_h)
    fits = (height, width) == (4 * grid_h * side, 4 * grid_w * side)
    expect(fits, f"images are {height}x{width} pixels, expected {grid_h}s x {grid_w}s with s a multiple of 4")
    if patch_of_slot is None:
        expect(side == 1, "without patch_of_slot the grid must be H/4 x W/4")
        return
    expect(patch_of_slot.dim() == 1, f"patch_of_slot must be [P], got {list(patch_of_slot.shape)}")
    table(patch_of_slot, images, (patch_of_slot.numel(), 0, patches - 1), "patch_of_slot")


def of(name: str) -> Callable[..., None]:
    """The checks of an operator of ``backends/triton``."""
    return globals()[name]
