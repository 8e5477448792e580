"""The CUDA backend: kernels from ``csrc/cuda``, matrix products by cuBLAS through PyTorch.

``CONVNEXTV2_KERNELS_CUDA_EMULATION`` names a library built by ``python setup.py build_emulation``: the same kernels
compiled for the CPU. Then this backend serves tensors on cpu, and only those; it is slow, for tests, and never chosen
by ``auto``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from ...layout import register_kernels
from .. import native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

EMULATED = bool(os.environ.get("CONVNEXTV2_KERNELS_CUDA_EMULATION"))
if EMULATED:
    _path = os.environ["CONVNEXTV2_KERNELS_CUDA_EMULATION"]
    if not Path(_path).exists():
        raise ValueError(f"CONVNEXTV2_KERNELS_CUDA_EMULATION must name a library that exists, got {_path!r}")
    torch.ops.load_library(_path)

NAMESPACE = "convnextv2_kernels_emulated" if EMULATED else "convnextv2_kernels"
DEVICE = "cpu" if EMULATED else "cuda"


def _find_load_error() -> str | None:
    if EMULATED:
        return None
    if native.load_error is not None:
        return native.load_error
    if native.module.build_info()["cuda"] is None:
        return "the extension was built without CUDA (no nvcc, or a PyTorch without CUDA, at installation)"
    return None


# found once: calls into the extension cannot be traced by torch.compile
_load_error = _find_load_error()
_architectures = () if EMULATED or _load_error else tuple(native.module.build_info()["cuda_architectures"])


def load_error() -> str | None:
    """Why the kernels are not there, or None."""
    return _load_error


def runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code built for an architecture runs on a GPU of compute capability ``major.minor``.

    "sm_90" is machine code, for 9.0 and later minor versions; "compute_90" is PTX, for 9.0 and all later GPUs; a
    suffix "a" is for that very version, "f" for its family."""
    kind, name = architecture.split("_")
    number, capability = int(name.rstrip("af")), 10 * major + minor
    if name.endswith("a"):
        return number == capability
    return number <= capability and (number // 10 == major or (kind == "compute" and not name.endswith("f")))


@functools.lru_cache
def _find_architecture_error(index: int | None) -> str | None:
    if EMULATED or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if any(runs_on(name, major, minor) for name in _architectures):
        return None
    built = ", ".join(_architectures)
    return f"the extension was built for {built}, and the GPU is of compute capability {major}.{minor}"


@torch.compiler.assume_constant_result
def _architecture_error(index: int | None) -> str | None:
    """Why the machine code in the extension does not run on a GPU, by default the current one, or None."""
    return _find_architecture_error(index)


def why_not(device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Reason these kernels cannot serve the device and dtype, or None."""
    if _load_error is not None:
        return _load_error
    if device_type != DEVICE:
        kind = "emulated kernels serve" if EMULATED else "kernels serve"
        return f"its {kind} tensors on {DEVICE}, and the input lies on {device_type}"
    if dtype not in DTYPES:
        return f"its kernels serve float32, float64, bfloat16 and float16, and the input is {dtype}"
    return _architecture_error(index)


if _load_error is None:
    from . import primitives  # (registers the operators' fakes, so that they can be traced)

    if not EMULATED:
        register_kernels(DEVICE, primitives, lambda device: _architecture_error(device.index) is None)
