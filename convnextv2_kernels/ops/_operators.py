"""The composite operators ``torch.ops.convnextv2_kernels.{mlp,gathered_mlp,block}_{forward,backward}``, and the GEMMs
of one layer.

Each is one opaque operator to ``torch.compile`` and ``torch.export``; inside runs the schedule over the kernels of the
named backend. Arguments are the fields of a NamedTuple of :mod:`..params`, from which the schema is made. (The kernels'
own operators: ``csrc/torch``.)
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, schedule
from ..backends import _flops
from ..backends._fakes import on_one_device
from ..dtypes import statistics_dtype
from ..params import (
    BlockBackwardArgs,
    BlockForwardArgs,
    GatheredMLPBackwardArgs,
    GatheredMLPForwardArgs,
    MLPBackwardArgs,
    MLPForwardArgs,
)
from . import _operator_checks
from ._dispatch import no_autocast

_NAMESPACE = "convnextv2_kernels"
_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", bool: "bool", float: "float", str: "str", torch.dtype: "ScalarType"}
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def _schema_of(arguments: type) -> str:
    """The fields of a NamedTuple as the arguments of a schema."""
    parts = []
    for name, kind in typing.get_type_hints(arguments).items():
        optional = isinstance(kind, types.UnionType)
        (base,) = (t for t in typing.get_args(kind) if t is not type(None)) if optional else (kind,)
        parts.append(f"{_SCHEMA_TYPES[base]}{'?' if optional else ''} {name}")
    return ", ".join(parts)


def define(name: str, arguments: Any, outputs: str, implementation: Callable, fake: Callable):
    """Registers an operator whose implementation and fake take its arguments as one NamedTuple, and returns it. The
    arguments have been checked where an op calls it, but a program of torch.export may hold others."""
    check = getattr(_operator_checks, name)

    def run(*args):
        # compiled code runs these under the caller's autocast; their casts are placed explicitly (dtypes.py)
        given = arguments._make(args)
        check(given)
        with no_autocast(args[0]):
            return implementation(given)

    _library.define(f"{name}({_schema_of(arguments)}) -> {outputs}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    one_device = on_one_device(lambda *args: fake(arguments._make(args)))
    torch.library.register_fake(f"{_NAMESPACE}::{name}", one_device, lib=_library)
    _flops.register(_NAMESPACE, name)
    return getattr(torch.ops.convnextv2_kernels, name).default


def differentiate(name: str, function) -> None:
    """Give an operator the backward of an autograd function that takes the same inputs. Only the operator's first
    output has a gradient; ``function.save`` stores what backward reads, ``function.gradients`` computes it."""

    def setup_context(ctx, inputs, output):
        function.save(ctx, inputs, output)

    def backward(ctx, grad, *_):
        return function.gradients(ctx, grad)

    torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _norms_fake(a: MLPForwardArgs | GatheredMLPForwardArgs | BlockForwardArgs) -> Tensor:
    images = 1 if a.batch_scope else a.segments.count
    return a.x.new_empty(images, a.w1.shape[0], dtype=statistics_dtype(a.dtype))


def _hidden_fakes(a: MLPForwardArgs | BlockForwardArgs) -> tuple[Tensor, Tensor]:
    saved = a.x.numel() // a.x.shape[-1] if a.save == "hidden" else 0
    return _norms_fake(a), a.x.new_empty(saved, a.w1.shape[0], dtype=a.dtype)


def _mlp_forward_fake(a: MLPForwardArgs):
    return a.x.new_empty(*a.x.shape[:-1], a.w2.shape[0]), *_hidden_fakes(a)


def _mlp_backward_fake(a: MLPBackwardArgs):
    db2 = a.w2.new_empty(a.w2.shape[0], dtype=statistics_dtype(a.dtype))
    return *(_like(t) for t in (a.x, a.w1, a.b1, a.gamma, a.beta, a.w2)), db2


def _gathered_mlp_forward_fake(a: GatheredMLPForwardArgs):
    side = a.places.side
    return a.x.new_empty(a.patch_of_slot.shape[0], side, side, a.w2.shape[0]), _norms_fake(a)


def _gathered_mlp_backward_fake(a: GatheredMLPBackwardArgs):
    norm = tuple(_like(t) for t in a.layer_norm or (a.x.new_empty(0), a.x.new_empty(0)))
    db2 = a.w2.new_empty(a.w2.shape[0], dtype=statistics_dtype(a.dtype))
    return _like(a.x), *norm, *(_like(t) for t in (a.w1, a.b1, a.gamma, a.beta, a.w2)), db2


def _block_forward_fake(a: BlockForwardArgs):
    x, saves = a.x, schedule.saves_normalized(a.save)
    z = x.new_empty(x.shape if saves else (0,), dtype=a.dtype)
    rstd = x.new_empty(x.shape[:-1] if saves else (0,), dtype=statistics_dtype(x.dtype))
    return x.new_empty(x.shape), z, rstd, *_hidden_fakes(a)


def _block_backward_fake(a: BlockBackwardArgs):
    ddb = a.dw_weight.new_empty(a.dw_weight.shape[0], dtype=statistics_dtype(a.x.dtype))
    db2 = a.w2.new_empty(a.w2.shape[0], dtype=statistics_dtype(a.dtype))
    rest = (a.ln_weight, a.ln_bias, a.w1, a.b1, a.gamma, a.beta, a.w2)
    return _like(a.x), _like(a.dw_weight), ddb, *(_like(t) for t in rest), db2


mlp_forward = define(
    "mlp_forward",
    MLPForwardArgs,
    "(Tensor out, Tensor norms, Tensor hidden)",
    lambda a: schedule.run_mlp_forward(backends.get(a.backend), a),
    _mlp_forward_fake,
)
mlp_backward = define(
    "mlp_backward",
    MLPBackwardArgs,
    "(Tensor dx, Tensor dw1, Tensor db1, Tensor dgamma, Tensor dbeta, Tensor dw2, Tensor db2)",
    lambda a: schedule.run_mlp_backward(backends.get(a.backend), a),
    _mlp_backward_fake,
)
gathered_mlp_forward = define(
    "gathered_mlp_forward",
    GatheredMLPForwardArgs,
    "(Tensor out, Tensor norms)",
    lambda a: schedule.run_gathered_mlp_forward(backends.get(a.backend), a),
    _gathered_mlp_forward_fake,
)
gathered_mlp_backward = define(
    "gathered_mlp_backward",
    GatheredMLPBackwardArgs,
    "(Tensor dx, Tensor dln_weight, Tensor dln_bias, Tensor dw1, Tensor db1, Tensor dgamma, Tensor dbeta, Tensor dw2, "
    "Tensor db2)",
    lambda a: schedule.run_gathered_mlp_backward(backends.get(a.backend), a),
    _gathered_mlp_backward_fake,
)
block_forward = define(
    "block_forward",
    BlockForwardArgs,
    "(Tensor out, Tensor z, Tensor rstd, Tensor norms, Tensor hidden)",
    lambda a: schedule.run_block_forward(backends.get(a.backend), a),
    _block_forward_fake,
)
block_backward = define(
    "block_backward",
    BlockBackwardArgs,
    "(Tensor dx, Tensor ddw_weight, Tensor ddw_bias, Tensor dln_weight, Tensor dln_bias, Tensor dw1, Tensor db1, "
    "Tensor dgamma, Tensor dbeta, Tensor dw2, Tensor db2)",
    lambda a: schedule.run_block_backward(backends.get(a.backend), a),
    _block_backward_fake,
)


class _Linear(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    backend: str


class _LinearInputGrad(NamedTuple):
    grad: Tensor
    weight: Tensor
    backend: str


class _LinearWeightGrad(NamedTuple):
    grad: Tensor
    x: Tensor
    backend: str


# GEMMs, registered under the names that exported programs hold.
linear = define(
    "product",
    _Linear,
    "Tensor",
    lambda a: backends.get(a.backend).linear(a.x, a.weight, a.bias),
    lambda a: a.x.new_empty(a.x.shape[0], a.weight.shape[0]),
)
linear_input_grad = define(
    "product_input_grad",
    _LinearInputGrad,
    "Tensor",
    lambda a: backends.get(a.backend).linear_input_grad(a.grad, a.weight),
    lambda a: a.grad.new_empty(a.grad.shape[0], a.weight.shape[1]),
)
linear_weight_grad = define(
    "product_weight_grad",
    _LinearWeightGrad,
    "Tensor",
    # a vendor's library may return a transposed view; the fake promises a contiguous matrix
    lambda a: backends.get(a.backend).linear_weight_grad(a.grad, a.x).contiguous(),
    lambda a: a.x.new_empty(a.grad.shape[1], a.x.shape[1], dtype=statistics_dtype(a.x.dtype)),
)
