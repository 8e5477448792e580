"""The CUDA backend: kernels from ``csrc/cuda``, matrix products by cuBLAS through PyTorch.

``CONVNEXTV2_KERNELS_CUDA_EMULATION`` names a library built by ``python setup.py build_emulation``: the same kernels
compiled for the CPU. Then this backend serves tensors on cpu, and only those; it is slow, for tests, and never chosen
by ``auto``.
"""

from __future__ import annotations

import functools
import os

import torch

from ...layout import register_kernels
from .. import extension

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

EMULATED = bool(os.environ.get("CONVNEXTV2_KERNELS_CUDA_EMULATION"))
if EMULATED:
    _path = os.environ["CONVNEXTV2_KERNELS_CUDA_EMULATION"]
    if not os.path.exists(_path):
        raise ValueError(f"CONVNEXTV2_KERNELS_CUDA_EMULATION must name a library that exists, got {_path!r}")
    torch.ops.load_library(_path)

NAMESPACE = "convnextv2_kernels_emulated" if EMULATED else "convnextv2_kernels"
DEVICE = "cpu" if EMULATED else "cuda"


def load_error() -> str | None:
    """Why the kernels are not there, or None."""
    if EMULATED:
        return None
    if extension.load_error is not None:
        return extension.load_error
    if extension.module.build_info()["cuda"] is None:
        return "the extension was built without CUDA (no nvcc, or a PyTorch without CUDA, at installation)"
    return None


@functools.lru_cache
def _architecture_error() -> str | None:
    """Why the machine code in the extension does not run on the current GPU, or None."""
    major, minor = torch.cuda.get_device_capability()
    built = extension.module.build_info()["cuda_architectures"]
    for name in built:  # sm_90: machine code, runs on 9.x with x >= 0; compute_100: PTX, runs on all from 10.0
        kind, number = name.split("_")
        number = int(number.rstrip("af"))
        if number <= 10 * major + minor and (kind == "compute" or number // 10 == major):
            return None
    return f"the extension was built for {', '.join(built)}, and the GPU is of compute capability {major}.{minor}"


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Reason these kernels cannot serve the device and dtype, or None."""
    error = load_error()
    if error is not None:
        return error
    if device_type != DEVICE:
        kind = "emulated kernels serve" if EMULATED else "kernels serve"
        return f"its {kind} tensors on {DEVICE}, and the input lies on {device_type}"
    if dtype not in DTYPES:
        return f"its kernels serve float32, float64, bfloat16 and float16, and the input is {dtype}"
    if not EMULATED and torch.cuda.is_available():
        return _architecture_error()
    return None


if load_error() is None:
    from . import primitives  # (registers the operators' fakes, so that they can be traced)

    if not EMULATED:
        register_kernels(DEVICE, primitives)
