"""Which backend runs an op, and why.

``auto`` takes, per call, the first backend of :data:`PREFERENCE` that supports the device and dtype; the reference
supports everything. A forced backend (:func:`use_backend`, or the environment variable ``CONVNEXTV2_KERNELS_BACKEND``)
that cannot run a call raises an error that says why; it never falls back silently. The choice is process-wide, like
``torch.backends`` flags, and is fixed for a node's backward when its forward runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..settings import current
from . import cuda, native, triton
from .base import Backend, KernelBackend
from .cpu import CPUBackend
from .cuda import CUDABackend
from .reference.backend import ReferenceBackend
from .triton import CUDATritonBackend, TritonBackend

# every backend there is: a new one is a line here
_CUDA = CUDABackend()
REGISTRY: dict[str, Backend] = {
    backend.name: backend for backend in (ReferenceBackend(), CPUBackend(), _CUDA, TritonBackend(), CUDATritonBackend())
}
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda+triton", "cuda", "triton", "reference")}
NAMES = (*REGISTRY, "auto")
_WITH_KERNELS = {name: backend for name, backend in REGISTRY.items() if isinstance(backend, KernelBackend)}

if cuda.load_error() is None and not cuda.EMULATED:
    layout.KERNELS["cuda"] = _CUDA

__all__ = [
    "NAMES",
    "PREFERENCE",
    "REGISTRY",
    "Backend",
    "KernelBackend",
    "cuda",
    "forced",
    "get",
    "native",
    "select",
    "triton",
    "unsupported_reason",
    "use_backend",
]


# what was selected before, by all that decides
_selected: dict[tuple, str] = {}


class _State:
    """Holder of the forced backend; an object, so that torch.compile guards on its attribute."""

    forced = "auto"


_state = _State()


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_state.forced = _check_name(current.backend, "CONVNEXTV2_KERNELS_BACKEND")


class use_backend:
    """Context manager that runs every op by the named backend: one of :data:`NAMES`, "auto" to choose per call.

    Raises ValueError for an unknown name at once, and RuntimeError where an op inside is not supported.
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
    """The name of the forced backend, or "auto"."""
    return _state.forced


def unsupported_reason(name: str, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Why a backend cannot run ops on tensors of this device and dtype, or None if it can. ``index``: of the device, by
    default the current one."""
    return REGISTRY[name].unsupported_reason(device_type, dtype, index)


def select(x: Tensor, op: str, gemm_dtype: torch.dtype | None = None, compiling: bool = False) -> str:
    """Name of the backend that runs ``op`` on input ``x``, with GEMMs in ``gemm_dtype``; nothing is remembered while
    ``compiling``."""
    name = _state.forced
    if compiling:
        return _select(name, x, op, gemm_dtype)
    key = (name, x.device, x.dtype, gemm_dtype)
    selected = _selected.get(key)
    if selected is None:
        selected = _selected[key] = _select(name, x, op, gemm_dtype)
    return selected


def _select(name: str, x: Tensor, op: str, gemm_dtype: torch.dtype | None) -> str:
    device, dtype = x.device, x.dtype
    dtypes = (dtype,) if gemm_dtype is None or gemm_dtype is dtype else (dtype, gemm_dtype)
    if name == "auto":
        return automatic(device.type, dtypes, device.index)
    for each in dtypes:
        reason = REGISTRY[name].unsupported_reason(device.type, each, device.index)
        if reason is not None:
            raise RuntimeError(f"{op} was asked of backend '{name}', but {reason}")
    return name


def automatic(device_type: str, dtypes: tuple[torch.dtype, ...], index: int | None = None) -> str:
    """What ``auto`` chooses for tensors of a device and dtypes."""
    for name in PREFERENCE.get(device_type, ()):
        backend = REGISTRY[name]
        if all(backend.unsupported_reason(device_type, dtype, index) is None for dtype in dtypes):
            return name
    return "reference"


def get(name: str) -> KernelBackend:
    """The kernels of a backend.

    Raises:
        ValueError: the name is of no backend with kernels.
    """
    backend = _WITH_KERNELS.get(name)
    if backend is None:
        raise ValueError(f"backend must be one of {', '.join(_WITH_KERNELS)}, got {name!r}")
    return backend
