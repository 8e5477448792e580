"""Whether Triton is there, and which tensors its kernels serve; found without importing it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil

import torch

from ...settings import current
from ..base import mismatch

INTERPRETED = current.triton_interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter truncates to bfloat16 instead of rounding, and multiplies its bits as integers
DTYPES = (torch.float32, torch.float64, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
_OLDEST = (3, 6)
# names of the packages in which PyTorch's builds install the module
_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")


def version() -> str | None:
    """Version of Triton, or None without it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return importlib.import_module("triton").__version__


def _find_load_error() -> str | None:
    found = version()
    if found is None:
        return "triton is not installed"
    parts = re.match(r"(\d+)\.(\d+)", found)
    if parts is not None and tuple(map(int, parts.groups())) < _OLDEST:
        return f"its kernels need triton {_OLDEST[0]}.{_OLDEST[1]} or newer, and {found} is installed"
    return None


# found once: package metadata cannot be read while torch.compile traces
_load_error = _find_load_error()


def load_error() -> str | None:
    """Why the kernels are not available, or None."""
    return _load_error


@functools.lru_cache
def _find_device_error(index: int | None) -> str | None:
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if not any(shutil.which(name) for name in compilers if name):
        return "Triton needs a C compiler when it runs, and there is none (CC, gcc, clang)"
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    return f"its kernels need a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}"


@torch.compiler.assume_constant_result
def _device_error(index: int | None) -> str | None:
    """Why Triton does not compile for a GPU, by default the current one, or None."""
    return _find_device_error(index)


def unsupported_reason(device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Why Triton's kernels cannot run on tensors of this device and dtype, or None."""
    if _load_error is not None:
        return _load_error
    kind = "interpreted kernels serve" if INTERPRETED else "kernels serve"
    reason = mismatch(device_type, dtype, DEVICE, DTYPES, kind)
    return _device_error(index) if reason is None else reason
