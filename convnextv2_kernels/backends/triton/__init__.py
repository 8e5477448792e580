"""The Triton backend: the kernels of this folder, compiled on the user's machine; NVIDIA and AMD GPUs."""

from .availability import DEVICE, DTYPES, INTERPRETED, load_error, unsupported_reason, version
from .backend import CUDATritonBackend, TritonBackend

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
