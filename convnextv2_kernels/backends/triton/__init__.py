"""The Triton backend: the kernels of this folder, compiled on the user's machine; NVIDIA and AMD GPUs."""

from .backend import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    CUDATritonBackend,
    TritonBackend,
    load_error,
    unsupported_reason,
    version,
)

__all__ = [
    "DEVICE",
    "DTYPES",
    "INTERPRETED",
    "CUDATritonBackend",
    "TritonBackend",
    "load_error",
    "unsupported_reason",
    "version",
]
