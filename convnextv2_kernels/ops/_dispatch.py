"""How every op reaches its backend: one choice, autocast off, the reference or the kernels; and what their backward may
not do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..tracing import exporting

_NOTHING = contextlib.nullcontext()
# other subclasses may bring a dispatch mode of their own
_PLAIN = (Tensor, torch.nn.Parameter)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The ops place their casts themselves (``dtypes.py``), so autocast is off inside them."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else _NOTHING


def dispatch(
    op: str,
    x: Tensor,
    reference: Callable[[], Tensor],
    kernel: Callable[[str], Tensor],
    gemm_dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs an op on input x by the backend that is forced or fits: ``reference()``, or ``kernel(name)`` with its name.

    An export into PyTorch's own operators records the reference.

    Raises:
        RuntimeError: a forced backend that cannot run it.
    """
    compiling = torch.compiler.is_compiling()
    if (compiling or torch._C._is_tracing()) and exporting():
        require_reference(f"an export of {op} to ONNX or TorchScript")
        name = "reference"
    else:
        name = backends.select(x, op, gemm_dtype, compiling)
    with no_autocast(x):
        if name == "reference":
            return reference()
        if compiling:
            return kernel(name)
        # PyTorch's own words about transforms help nobody
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(_only_the_reference(f"{op} cannot be transformed by torch.func (vmap, grad, jvp, ...)"))
        try:
            return kernel(name)
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            raise RuntimeError(_only_the_reference(f"{op} has no forward-mode derivative")) from error


def _only_the_reference(what: str, purpose: str = "that") -> str:
    return f"{what}; run the forward pass under convnextv2_kernels.use_backend('reference') for {purpose}"


def traced() -> bool:
    """Whether calls are recorded or replaced (torch.compile, torch.export, a dispatch mode): an op has to be one
    registered operator then; otherwise the schedule is called directly."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def composite(operator: Callable[..., Any], function: Callable[..., Any], arguments: Any) -> Any:
    """Calls a composite operator, or outside of tracing the function of the schedule that it runs."""
    if traced() or type(arguments[0]) not in _PLAIN:
        return operator(*arguments)
    with no_autocast(arguments[0]):
        return function(backends.get(arguments.backend), arguments)


def require_reference(what: str) -> None:
    """Raise RuntimeError where another backend is forced for what only the reference has."""
    if backends.forced() not in ("auto", "reference"):
        raise RuntimeError(f"{what} was asked of backend '{backends.forced()}', but only the reference has it")


def reference_forced() -> bool:
    """Whether ops are to run in plain PyTorch throughout, which has higher derivatives and can be exported."""
    return backends.forced() == "reference" or exporting()


def once_differentiable(backward):
    """Marks ``backward(ctx, *grads)`` as not differentiable itself.

    PyTorch's decorator of this name stays silent where the incoming gradient is a constant, so that
    ``create_graph=True`` gives a gradient without a graph; this one raises.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *grads):
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        name = type(ctx).__name__.removeprefix("_")
        if torch.is_grad_enabled():
            what = f"{name} can be differentiated once only, got create_graph=True"
            raise RuntimeError(_only_the_reference(what, "higher derivatives"))
        try:
            return backward(ctx, *grads)
        except RuntimeError as error:
            if "Batching rule" not in str(error):
                raise
            raise RuntimeError(_only_the_reference(f"{name} takes no batch of gradients (vmap)")) from error

    return wrapped
