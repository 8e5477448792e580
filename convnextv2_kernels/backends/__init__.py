"""Which backend serves an op, and why.

``auto`` takes, per call, the first backend of :data:`PREFERENCE` that can serve the device and dtype; the reference
can serve everything. A forced backend (:func:`use_backend`, or the environment variable
``CONVNEXTV2_KERNELS_BACKEND``) that cannot serve a call raises an error that says why; it never falls back silently.
The choice is process-wide, like ``torch.backends`` flags, and is fixed for a node's backward when its forward runs.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, cuda, triton

NAMES = ("reference", "cpu", "cuda", "triton", "auto")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# CUDA's kernels with Triton's fused products, chosen by ``auto`` for the ops that have such products
MIXED = "cuda+triton"
FUSED_OPS = ("pointwise_mlp", "gathered_pointwise_mlp", "convnextv2_block")


class _State:
    """Holder of the forced backend; an object, so that torch.compile guards on its attribute."""

    forced = "auto"


_state = _State()


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_state.forced = _check_name(os.environ.get("CONVNEXTV2_KERNELS_BACKEND", "auto"), "CONVNEXTV2_KERNELS_BACKEND")


class use_backend:
    """Context manager that serves every op by the named backend: "reference", "cpu", "cuda", "triton" or "auto".

    Raises ValueError for an unknown name at once, and RuntimeError where an op inside cannot be served.
    """

    def __init__(self, name: str):
        self.name = _check_name(name, "backend")
        self._previous: list[str] = []  # a stack: one object may be entered again inside itself

    def __enter__(self) -> use_backend:
        self._previous.append(_state.forced)
        _state.forced = self.name
        return self

    def __exit__(self, *exc) -> None:
        _state.forced = self._previous.pop()


def forced() -> str:
    """The backend asked for by name, or "auto"."""
    return _state.forced


def why_not(name: str, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Reason the backend cannot serve tensors of this device and dtype, or None if it can. ``index`` is that of the
    device, by default the current one."""
    if name == "reference":
        return None
    if name == "cpu":
        return cpu.why_not(device_type, dtype)
    if name == "cuda":
        return cuda.why_not(device_type, dtype, index)
    return triton.why_not(device_type, dtype, index)


def select(x: Tensor, op: str, product_dtype: torch.dtype | None = None) -> str:
    """Name of the backend that serves ``op`` for input ``x``, with matrix products in ``product_dtype``."""
    kind, index = x.device.type, x.device.index
    dtypes = (x.dtype,) if product_dtype in (None, x.dtype) else (x.dtype, product_dtype)
    if _state.forced != "auto":
        for dtype in dtypes:
            reason = why_not(_state.forced, kind, dtype, index)
            if reason is not None:
                raise RuntimeError(f"{op} was asked of backend '{_state.forced}', but {reason}")
        return _state.forced
    return automatic(op, kind, dtypes, index)


def automatic(op: str, device_type: str, dtypes: tuple[torch.dtype, ...], index: int | None = None) -> str:
    """What ``auto`` chooses for an op on a device where tensors have these dtypes."""

    def serves(name):
        return all(why_not(name, device_type, dtype, index) is None for dtype in dtypes)

    for name in PREFERENCE.get(device_type, ("reference",)):
        if serves(name):
            return MIXED if name == "cuda" and op in FUSED_OPS and serves("triton") else name
    return "reference"


def primitives(name: str) -> ModuleType:
    """The row, convolution and matrix-product primitives of a backend, called by the schedule and the ops."""
    if name == "cpu":
        from .cpu import primitives as module
    elif name == "cuda":
        from .cuda import primitives as module
    elif name == "triton":
        from .triton import primitives as module
    elif name == MIXED:
        from . import mixed as module
    else:
        from .reference import mlp as module
    return module
