"""The composite operators: ``mlp`` and ``block``, forward and backward, and the matrix products of one layer.

Each is one opaque operator to ``torch.compile`` and ``torch.export``; inside runs the schedule over the primitives of
the named backend. (The primitives' own schemas stand in ``csrc/torch/schemas.cpp``.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, schedule
from ..backends.reference.norm import statistics_dtype
from ..dtypes import no_autocast

_NAMESPACE = "convnextv2_kernels"
# the same for forward and backward; of save, backward sees the outcome in the tensors it is given
_SETTINGS = (
    "SymInt rows_per_slot, SymInt images, bool batch_scope, str act, float grn_eps, str save, ScalarType dtype, "
    "str backend"
)
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def _define(schema: str, implementation, fake):
    name = schema.split("(", 1)[0]

    def run(*args):
        # compiled code runs these under the caller's autocast; their casts are placed explicitly (dtypes.py)
        with no_autocast(args[0]):
            return implementation(*args)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.convnextv2_kernels, name).default


def differentiate(name: str, function) -> None:
    """Give an operator the backward of an autograd function: its first ``function.TENSORS`` inputs are that one's, of
    its outputs only the first has a gradient, and ``function.keep`` saves what backward reads."""

    def setup_context(ctx, inputs, output):
        function.keep(ctx, inputs[: function.TENSORS], inputs[function.TENSORS :], output)

    def backward(ctx, grad, *_):
        *grads, _ = function.backward(ctx, grad)
        return *grads, *(None for _ in ctx.args)

    torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def _rows(x: Tensor, offsets: Tensor | None, rows_per_slot: int, images: int, batch: bool) -> schedule.Rows:
    total = x.numel() // x.shape[-1]
    return schedule.Rows(total, images, rows_per_slot, offsets, batch)


def _keeps(save: str, what: str) -> bool:
    """Whether the policy keeps "normalized" rows or "hidden" activations for backward."""
    return schedule.SAVE_POLICIES.index(save) >= schedule.SAVE_POLICIES.index(what)


def _flat(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if dtype is None else x.to(dtype)


def _reshaped(out: Tensor, shape) -> Tensor:
    """A tensor that is nobody's view: autograd forbids changing views that a function returned in place."""
    return torch.ops.aten._unsafe_view.default(out, shape)


def _mlp_forward(
    x,
    w1,
    b1,
    gamma,
    beta,
    w2,
    b2,
    residual,
    factors,
    offsets,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    rows = _rows(x, offsets, rows_per_slot, images, batch)
    out, norms, kept = schedule.mlp_forward(
        backends.primitives(backend),
        _flat(x, dtype),
        w1,
        b1,
        gamma,
        beta,
        w2,
        b2,
        _flat(residual),
        factors,
        rows,
        act,
        grn_eps,
        x.dtype,
        _keeps(save, "hidden"),
    )
    return _reshaped(out, (*x.shape[:-1], w2.shape[0])), norms, kept


def _hidden_fakes(x, w1, images, batch, save, dtype):
    norms = x.new_empty(1 if batch else images, w1.shape[0], dtype=statistics_dtype(dtype))
    total = x.numel() // x.shape[-1]
    kept = total if _keeps(save, "hidden") else 0
    return norms, x.new_empty(kept, w1.shape[0], dtype=dtype)


def _mlp_forward_fake(
    x,
    w1,
    b1,
    gamma,
    beta,
    w2,
    b2,
    residual,
    factors,
    offsets,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    out = x.new_empty(*x.shape[:-1], w2.shape[0])
    return out, *_hidden_fakes(x, w1, images, batch, save, dtype)


def _mlp_backward(
    dout,
    x,
    w1,
    b1,
    gamma,
    beta,
    w2,
    factors,
    offsets,
    norms,
    kept,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    rows = _rows(x, offsets, rows_per_slot, images, batch)
    grads = schedule.mlp_backward(
        backends.primitives(backend),
        _flat(dout),
        _flat(x, dtype),
        w1,
        b1,
        gamma,
        beta,
        w2,
        factors,
        norms,
        kept,
        rows,
        act,
        grn_eps,
    )
    return (
        grads.x.to(x.dtype).view(x.shape),
        grads.w1.to(w1.dtype),
        grads.b1.to(b1.dtype),
        grads.gamma.to(gamma.dtype).view(gamma.shape),
        grads.beta.to(beta.dtype).view(beta.shape),
        grads.w2.to(w2.dtype),
        grads.b2,
    )


def _mlp_backward_fake(
    dout,
    x,
    w1,
    b1,
    gamma,
    beta,
    w2,
    factors,
    offsets,
    norms,
    kept,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    likes = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w1, b1, gamma, beta, w2))
    return *likes, w2.new_empty(w2.shape[0], dtype=statistics_dtype(dtype))


def _conv_norm(k, x, dw_weight, dw_bias, neighbours, layer_norm, eps):
    """LN(conv(x)), or without ``layer_norm`` its normalised rows; and 1/std."""
    stat = statistics_dtype(x.dtype)
    params = (dw_weight, dw_bias, *(layer_norm or (None, None)))
    w, b, gain, shift = (None if p is None else p.to(stat).contiguous() for p in params)
    return k.depthwise_conv_normalize(x, w, b, neighbours, gain, shift, eps)


def _block_forward(
    x,
    dw_weight,
    dw_bias,
    ln_weight,
    ln_bias,
    w1,
    b1,
    gamma,
    beta,
    w2,
    b2,
    neighbours,
    factors,
    offsets,
    eps,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    k = backends.primitives(backend)
    layer_norm = schedule.LayerNormParams(ln_weight, ln_bias)
    keep = _keeps(save, "normalized")
    if keep or k.FOLDS_LAYER_NORM:
        z, rstd = _conv_norm(k, x, dw_weight, dw_bias, neighbours, None, eps)
        z = z.to(dtype)
        y = z if k.FOLDS_LAYER_NORM else layer_norm.apply(z)
    else:
        y = _conv_norm(k, x, dw_weight, dw_bias, neighbours, layer_norm, eps)[0].to(dtype)
    if not keep:
        z, rstd = y.new_empty(0), x.new_empty(0, dtype=statistics_dtype(x.dtype))
    rows = _rows(x, offsets, rows_per_slot, images, batch)
    out, norms, kept = schedule.mlp_forward(
        k,
        _flat(y),
        w1,
        b1,
        gamma,
        beta,
        w2,
        b2,
        _flat(x),
        factors,
        rows,
        act,
        grn_eps,
        x.dtype,
        _keeps(save, "hidden"),
        layer_norm if k.FOLDS_LAYER_NORM else None,
    )
    return _reshaped(out, x.shape), z, rstd, norms, kept


def _block_forward_fake(
    x,
    dw_weight,
    dw_bias,
    ln_weight,
    ln_bias,
    w1,
    b1,
    gamma,
    beta,
    w2,
    b2,
    neighbours,
    factors,
    offsets,
    eps,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    keep = _keeps(save, "normalized")
    z = x.new_empty(x.shape if keep else (0,), dtype=dtype)
    rstd = x.new_empty(x.shape[:-1] if keep else (0,), dtype=statistics_dtype(x.dtype))
    return x.new_empty(x.shape), z, rstd, *_hidden_fakes(x, w1, images, batch, save, dtype)


def _block_backward(
    dout,
    x,
    z,
    rstd,
    norms,
    kept,
    dw_weight,
    dw_bias,
    ln_weight,
    ln_bias,
    w1,
    b1,
    gamma,
    beta,
    w2,
    neighbours,
    factors,
    offsets,
    eps,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    k = backends.primitives(backend)
    stat = statistics_dtype(x.dtype)
    if z.dim() == 1:
        z, rstd = _conv_norm(k, x, dw_weight, dw_bias, neighbours, None, eps)
        z = z.to(dtype)
    rows = _rows(x, offsets, rows_per_slot, images, batch)
    grads = schedule.mlp_backward(
        k,
        _flat(dout),
        _flat(z),
        w1,
        b1,
        gamma,
        beta,
        w2,
        factors,
        norms,
        kept,
        rows,
        act,
        grn_eps,
        schedule.LayerNormParams(ln_weight, ln_bias),
        rstd.view(-1),
    )
    dy = grads.x.to(x.dtype).view(x.shape)
    ddw, ddb = k.depthwise_conv_backward_weight(dy, x, neighbours, dw_weight.shape[-1])
    dx = k.depthwise_conv_forward(dy, dw_weight.to(stat).contiguous(), None, dout, neighbours, True)
    return (
        dx,
        ddw.to(dw_weight.dtype),
        ddb,
        grads.ln_weight.to(ln_weight.dtype),
        grads.ln_bias.to(ln_bias.dtype),
        grads.w1.to(w1.dtype),
        grads.b1.to(b1.dtype),
        grads.gamma.to(gamma.dtype).view(gamma.shape),
        grads.beta.to(beta.dtype).view(beta.shape),
        grads.w2.to(w2.dtype),
        grads.b2,
    )


def _block_backward_fake(
    dout,
    x,
    z,
    rstd,
    norms,
    kept,
    dw_weight,
    dw_bias,
    ln_weight,
    ln_bias,
    w1,
    b1,
    gamma,
    beta,
    w2,
    neighbours,
    factors,
    offsets,
    eps,
    rows_per_slot,
    images,
    batch,
    act,
    grn_eps,
    save,
    dtype,
    backend,
):
    def like(t):
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    ddb = dw_weight.new_empty(dw_weight.shape[0], dtype=statistics_dtype(x.dtype))
    db2 = w2.new_empty(w2.shape[0], dtype=statistics_dtype(dtype))
    rest = (ln_weight, ln_bias, w1, b1, gamma, beta, w2)
    return like(x), like(dw_weight), ddb, *(like(t) for t in rest), db2


def _product(x, weight, bias, backend):
    return backends.primitives(backend).linear(x, weight, bias)


def _product_input_grad(grad, weight, backend):
    return backends.primitives(backend).linear_input_grad(grad, weight)


def _product_weight_grad(grad, x, backend):
    # a library may hand back a transposed view; the fake promises a contiguous matrix
    return backends.primitives(backend).linear_weight_grad(grad, x).contiguous()


product = _define(
    "product(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    _product,
    lambda x, weight, bias, backend: x.new_empty(x.shape[0], weight.shape[0]),
)
product_input_grad = _define(
    "product_input_grad(Tensor grad, Tensor weight, str backend) -> Tensor",
    _product_input_grad,
    lambda grad, weight, backend: grad.new_empty(grad.shape[0], weight.shape[1]),
)
product_weight_grad = _define(
    "product_weight_grad(Tensor grad, Tensor x, str backend) -> Tensor",
    _product_weight_grad,
    lambda grad, x, backend: x.new_empty(grad.shape[1], x.shape[1], dtype=statistics_dtype(x.dtype)),
)

_MLP = "Tensor w1, Tensor b1, Tensor gamma, Tensor beta, Tensor w2"
_NORM = "Tensor ln_weight, Tensor ln_bias"

mlp_forward = _define(
    f"mlp_forward(Tensor x, {_MLP}, Tensor b2, Tensor? residual, Tensor? factors, Tensor? offsets, {_SETTINGS})"
    " -> (Tensor out, Tensor norms, Tensor hidden)",
    _mlp_forward,
    _mlp_forward_fake,
)
mlp_backward = _define(
    f"mlp_backward(Tensor dout, Tensor x, {_MLP}, Tensor? factors, Tensor? offsets, Tensor norms, Tensor hidden, "
    f"{_SETTINGS}) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dgamma, Tensor dbeta, Tensor dw2, Tensor db2)",
    _mlp_backward,
    _mlp_backward_fake,
)
block_forward = _define(
    f"block_forward(Tensor x, Tensor dw_weight, Tensor? dw_bias, {_NORM}, {_MLP}, Tensor b2, Tensor? neighbours, "
    f"Tensor? factors, Tensor? offsets, float eps, {_SETTINGS})"
    " -> (Tensor out, Tensor z, Tensor rstd, Tensor norms, Tensor hidden)",
    _block_forward,
    _block_forward_fake,
)
block_backward = _define(
    "block_backward(Tensor dout, Tensor x, Tensor z, Tensor rstd, Tensor norms, Tensor hidden, Tensor dw_weight, "
    f"Tensor? dw_bias, {_NORM}, {_MLP}, Tensor? neighbours, Tensor? factors, Tensor? offsets, float eps, {_SETTINGS})"
    " -> (Tensor dx, Tensor ddw_weight, Tensor ddw_bias, Tensor dln_weight, Tensor dln_bias, Tensor dw1, "
    "Tensor db1, Tensor dgamma, Tensor dbeta, Tensor dw2, Tensor db2)",
    _block_backward,
    _block_backward_fake,
)
