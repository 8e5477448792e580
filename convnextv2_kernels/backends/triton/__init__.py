"""The Triton backend: the kernels of this folder, compiled on the user's machine; no nvcc, NVIDIA and AMD GPUs.

With ``TRITON_INTERPRET=1`` in the environment Triton runs kernels in Python on the CPU. Then this backend serves
tensors on cpu, and only those; it is very slow, for tests, and never chosen by ``auto``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter rounds to bfloat16 by cutting off and multiplies its bits as integers
DTYPES = (torch.float32, torch.float64, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
_OLDEST = (3, 6)


def _find_load_error() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed (pip install triton)"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"its kernels need triton {_OLDEST[0]}.{_OLDEST[1]} or newer, and {version} is installed"
    return None


# found once: package metadata cannot be read while torch.compile traces
_load_error = _find_load_error()


def load_error() -> str | None:
    """Why the kernels are not there, or None."""
    return _load_error


@torch.compiler.assume_constant_result
@functools.lru_cache
def _device_error(index: int | None) -> str | None:
    """Why Triton does not compile for a GPU, by default the current one, or None."""
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    return f"its kernels need a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}"


def why_not(device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Reason these kernels cannot serve the device and dtype, or None."""
    if _load_error is not None:
        return _load_error
    if device_type != DEVICE:
        kind = "interpreted kernels serve" if INTERPRETED else "kernels serve"
        return f"its {kind} tensors on {DEVICE}, and the input lies on {device_type}"
    if dtype not in DTYPES:
        names = [str(d).removeprefix("torch.") for d in DTYPES]
        return f"its kernels serve {', '.join(names[:-1])} and {names[-1]}, and the input is {dtype}"
    return _device_error(index)
