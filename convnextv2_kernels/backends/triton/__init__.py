"""The Triton backend: the kernels of this folder, compiled on the user's machine; no nvcc, NVIDIA and AMD GPUs.

With ``TRITON_INTERPRET=1`` in the environment Triton runs kernels in Python on the CPU. Then this backend serves
tensors on cpu, and only those; it is very slow, for tests, and never chosen by ``auto``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter rounds to bfloat16 by cutting off and multiplies its bits as integers
DTYPES = (torch.float32, torch.float64, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
_OLDEST = (3, 6)


# names under which PyTorch's builds install the module
_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")


def version() -> str | None:
    """Of Triton, or None without it."""
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
    """Why the kernels are not there, or None."""
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
