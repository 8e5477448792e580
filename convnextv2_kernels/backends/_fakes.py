"""What every operator of ``csrc/torch`` returns, without data: so that they can be traced and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..dtypes import statistics_dtype

_FAKES: dict[str, Callable] = {}
_registered: set[str] = set()  # backends may share a namespace


def register(namespace: str, *names: str) -> None:
    """Registers the fakes of operators of ``torch.ops.<namespace>``, all of them unless named."""
    for name in names or _FAKES:
        operator = f"{namespace}::{name}"
        if operator not in _registered:
            torch.library.register_fake(operator, on_one_device(_FAKES[name]))
            _registered.add(operator)


def on_one_device(fake: Callable) -> Callable:
    """The dispatcher also calls a fake where one argument lies on the device "meta" and the others do not, and would
    then return memory that nobody wrote."""

    @functools.wraps(fake)
    def checked(*args, **kwargs):
        devices = {str(t.device) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise ValueError(
                f"convnextv2_kernels: all tensors must lie on one device, got {', '.join(sorted(devices))}"
            )
        return fake(*args, **kwargs)

    return checked


def _fake(name: str):
    def remember(function):
        _FAKES[name] = function

    return remember


def _stat(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=statistics_dtype(like.dtype))


@_fake("depthwise_conv_forward")
def _(x, weight, bias, residual, neighbours, flip):
    return x.new_empty(x.shape)


@_fake("depthwise_conv_normalize")
def _(x, weight, bias, neighbours, ln_weight, ln_bias, eps):
    return x.new_empty(x.shape), _stat(x, *x.shape[:-1])


@_fake("depthwise_conv_backward_weight")
def _(grad, x, neighbours, kernel_size):
    return _stat(x, x.shape[-1], 1, kernel_size, kernel_size), _stat(x, x.shape[-1])


@_fake("layer_norm_forward")
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), _stat(x, *x.shape[:-1]), _stat(x, *x.shape[:-1])


@_fake("layer_norm_backward")
def _(grad, x, mean, rstd, weight):
    return x.new_empty(x.shape), _stat(x, x.shape[-1]), _stat(x, x.shape[-1])


@_fake("normalized_backward")
def _(dy, z, rstd, weight):
    return z.new_empty(z.shape), _stat(z, z.shape[-1]), _stat(z, z.shape[-1])


@_fake("space_to_depth_normalize")
def _(x, weight, bias, eps):
    maps, h, w, c = x.shape
    return x.new_empty(maps, h // 2, w // 2, 4 * c), _stat(x, maps, h, w)


@_fake("space_to_depth_normalize_backward")
def _(dy, z, rstd, weight):
    c = z.shape[-1] // 4
    return z.new_empty(*rstd.shape, c), _stat(z, c), _stat(z, c)


@_fake("grn_forward")
def _(x, gamma, beta, offsets, rows_per_slot, segments, gelu, eps):
    return x.new_empty(x.shape), _stat(x, segments, x.shape[-1])


@_fake("grn_backward")
def _(grad, x, gamma, norm, offsets, rows_per_slot, segments, gelu, eps):
    return x.new_empty(x.shape), _stat(x, x.shape[-1]), _stat(x, x.shape[-1])


@_fake("layer_norm_grn_forward")
def _(x, ln_weight, ln_bias, gamma, beta, offsets, rows_per_slot, segments, ln_eps, eps):
    row = x.shape[:-1]
    return x.new_empty(x.shape), _stat(x, *row), _stat(x, *row), _stat(x, segments, x.shape[-1])


@_fake("layer_norm_grn_backward")
def _(grad, x, mean, rstd, ln_weight, ln_bias, gamma, norm, offsets, rows_per_slot, segments, eps):
    return x.new_empty(x.shape), *(_stat(x, x.shape[-1]) for _ in range(4))


@_fake("column_sum")
def _(x):
    return _stat(x, x.shape[-1])


@_fake("transpose_rows")
def _(x):
    return x.new_empty(x.shape[1], x.shape[0])


@_fake("gather_patches")
def _(x, patch_of_slot, grid_h, grid_w):
    side = x.shape[1] // grid_h
    return x.new_empty(patch_of_slot.shape[0], side, side, x.shape[-1])


@_fake("scatter_patches")
def _(x, slot_of_patch, grid_h, grid_w, fill):
    return x.new_empty(slot_of_patch.shape[0], grid_h * x.shape[1], grid_w * x.shape[1], x.shape[-1])


@_fake("gather_normalize")
def _(x, patch_of_slot, grid_h, grid_w, weight, bias, eps):
    side, slots = x.shape[1] // grid_h, patch_of_slot.shape[0]
    return x.new_empty(slots, side, side, x.shape[-1]), _stat(x, slots, side, side)


@_fake("normalized_backward_put")
def _(dy, z, rstd, weight, patch_of_slot, grid_h, grid_w, dx):
    return tuple(_stat(z, 0 if weight is None else z.shape[-1]) for _ in range(2))


@_fake("put_patches")
def _(x, patch_of_slot, grid_h, grid_w, out):
    return None


@_fake("patch_pixels")
def _(images, patch_of_slot, grid_h, grid_w):
    n, c, h, _w = images.shape
    if patch_of_slot is None:
        return images.new_empty(n, grid_h, grid_w, c * 16)
    side = h // (4 * grid_h)
    return images.new_empty(patch_of_slot.shape[0], side, side, c * 16)


@_fake("gelu_statistics")
def _(a, h, gamma, eps, tanh, offsets, rows_per_slot, segments):
    return _stat(a, segments, a.shape[-1]), _stat(a, segments, a.shape[-1])


@_fake("gelu_scale")
def _(a, out, scale, tanh, offsets, rows_per_slot, segments, beta=None, gelu=True):
    return None


@_fake("mlp_backward_statistics")
def _(a, ds, t, norm, gamma, eps, tanh, offsets, rows_per_slot, segments):
    return norm.new_empty(norm.shape), norm.new_empty(norm.shape), norm.new_empty(norm.shape[-1])


@_fake("mlp_backward_pointwise")
def _(a, ds, scale, kappa, hs, da, tanh, offsets, rows_per_slot, segments, beta=None):
    return _stat(a, a.shape[-1])


@_fake("normalized_backward_input")
def _(dz, z, rstd):
    return z.new_empty(z.shape)


@_fake("mlp_parameters")
def _(w1, b1, w2, b2, beta, ln_weight, ln_bias, like):
    same = w1.dtype == like.dtype
    first = like.new_empty(0 if same and ln_weight is None else w1.shape[0], w1.shape[1])
    second = like.new_empty(0 if same else w2.shape[0], w2.shape[1])
    return first, like.new_empty(w1.shape[0]), second, like.new_empty(0 if b2 is None else w2.shape[0])


@_fake("unfold_layer_norm")
def _(w1, ln_weight, ln_bias, db1, dw1):
    return _stat(w1, w1.shape[1]), _stat(w1, w1.shape[1])


@_fake("products_reduce")
def _(g, w2):
    return g.new_empty(g.shape[0], g.shape[2])


@_fake("products_weight")
def _(g, scale, d_sum, beta):
    return g.new_empty(g.shape[1], g.shape[2])


@_fake("layout_from_kept")
def _(ids, grid_h, grid_w):
    def index(*shape):
        return ids.new_empty(shape, dtype=torch.int32)

    n, kept = ids.shape
    return index(n, grid_h * grid_w), index(n * kept), index(n + 1)


@_fake("neighbour_slots")
def _(slot_of_patch, patch_of_slot, grid_h, grid_w, radius):
    return patch_of_slot.new_empty(patch_of_slot.shape[0], (2 * radius + 1) ** 2)
