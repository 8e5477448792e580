"""Floating-point operations of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

By PyTorch's own convention: products of matrices and convolutions only, two operations a multiply-add, taps that fall
on padding included. Taps on hidden sites are counted alike, so that a layout that hides nothing counts as the dense
map does, and nothing is read back from a device; ``benchmark/counts.py`` counts the taps that exist. Backward counts
what runs, with what is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..params import BlockBackwardArgs, BlockForwardArgs, MLPBackwardArgs, MLPForwardArgs

FORMULAS: dict[str, Callable[..., int]] = {}
# They multiply elements or sum them, which nobody counts, or copy.
WITHOUT_PRODUCTS = frozenset(
    """
    column_sum gather_normalize gather_patches gelu_scale gelu_statistics grn_backward grn_forward layer_norm_backward
    layer_norm_forward layer_norm_grn_backward layer_norm_grn_forward layout_from_kept mlp_backward_pointwise
    mlp_backward_statistics mlp_parameters neighbour_slots normalized_backward normalized_backward_input
    normalized_backward_put patch_pixels products_reduce products_weight put_patches scatter_patches
    space_to_depth_normalize space_to_depth_normalize_backward transpose_rows unfold_layer_norm
    """.split()
)
Shape: TypeAlias = Sequence[int]


def _formula(function: Callable[..., int]) -> Callable[..., int]:
    """Its arguments are the operator's, with a shape in the place of each tensor."""
    FORMULAS[function.__name__] = function
    return function


def _conv(x: Shape, weight: Shape) -> int:
    return 2 * prod(x) * weight[-1] ** 2


def _products(rows: int, w1: Shape, w2: Shape) -> tuple[int, int]:
    """Operations of the MLP's two products."""
    return 2 * rows * prod(w1), 2 * rows * prod(w2)


def _mlp_backward(rows: int, w1: Shape, w2: Shape, hidden: Shape) -> int:
    """The first product runs again unless its rows were saved; the gradient of GRN's beta is a product of one row."""
    first, second = _products(rows, w1, w2)
    return (2 if hidden[0] else 3) * first + 2 * second + 2 * prod(w2)


@_formula
def depthwise_conv_forward(x, weight, *_, **__) -> int:
    return _conv(x, weight)


@_formula
def depthwise_conv_normalize(x, weight, *_, **__) -> int:
    return _conv(x, weight)


@_formula
def depthwise_conv_backward_weight(grad, x, neighbours, kernel_size, **_) -> int:
    return _conv(x, (kernel_size,))


@_formula
def mlp_forward(*args: Any, out_shape: Any = None, **named: Any) -> int:
    a: Any = MLPForwardArgs(*args, **named)
    return sum(_products(prod(a.x[:-1]), a.w1, a.w2))


@_formula
def mlp_backward(*args: Any, out_shape: Any = None, **named: Any) -> int:
    a: Any = MLPBackwardArgs(*args, **named)
    return _mlp_backward(prod(a.dout[:-1]), a.w1, a.w2, a.hidden)


@_formula
def gathered_mlp_forward(*args, out_shape, **_) -> int:
    return sum(_products(prod(out_shape[0][:-1]), args[1], args[5]))


@_formula
def gathered_mlp_backward(*args, **_) -> int:
    return _mlp_backward(prod(args[0][:-1]), args[2], args[6], (0,))


@_formula
def block_forward(*args: Any, out_shape: Any = None, **named: Any) -> int:
    a: Any = BlockForwardArgs(*args, **named)
    return _conv(a.x, a.dw_weight) + sum(_products(prod(a.x[:-1]), a.w1, a.w2))


@_formula
def block_backward(*args: Any, out_shape: Any = None, **named: Any) -> int:
    a: Any = BlockBackwardArgs(*args, **named)
    convolutions = 2 if len(a.z) > 1 else 3
    return convolutions * _conv(a.x, a.dw_weight) + _mlp_backward(prod(a.x[:-1]), a.w1, a.w2, a.hidden)


@_formula
def product(x, weight, *_, **__) -> int:
    return 2 * x[0] * prod(weight)


@_formula
def product_input_grad(grad, weight, *_, **__) -> int:
    return 2 * grad[0] * prod(weight)


@_formula
def product_weight_grad(grad, x, *_, **__) -> int:
    return 2 * prod(grad) * x[1]


def register(namespace: str, *names: str) -> None:
    """Gives FlopCounterMode the formulas of operators of ``torch.ops.<namespace>``, all there are unless named."""
    for name in FORMULAS.keys() & names if names else FORMULAS:
        operator = getattr(getattr(torch.ops, namespace), name, None)
        if operator is None or operator in flop_counter.flop_registry:
            continue  # backends may share a namespace
        flop_counter.register_flop_formula(operator)(FORMULAS[name])
        # A backend may define an operator on first use, and a counter copies the registry when it is made.
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, flop_counter._FlopCounterMode):
                mode.counter.flop_registry[operator] = flop_counter.flop_registry[operator]
