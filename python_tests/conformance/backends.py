"""The backends under test. A new backend is one line of BACKENDS."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from convnextv2_kernels import backends

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Backend(NamedTuple):
    """``name`` as ``use_backend`` takes it, the device of its tensors, and the dtypes its kernels serve; those with
    float64 are gradchecked."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def has_float64(self) -> bool:
        return F64 in self.dtypes

    @property
    def narrow(self) -> torch.dtype:
        """The 16 bits of its mixed precision."""
        return BF16 if BF16 in self.dtypes else F16

    @property
    def interpreted(self) -> bool:
        """Whether every operation of a kernel is a call in Python: such a backend gets a sample of the long tests."""
        return self.name == "triton" and backends.triton.INTERPRETED

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return backends.unsupported_reason(self.name, self.device, self.dtypes[0])


REFERENCE = Backend("reference", "cpu", (F32, F64, BF16, F16))
CPU = Backend("cpu", "cpu", (F32, F64, BF16))
CUDA = Backend("cuda", backends.cuda.CUDABackend.device_type, (F32, F64, BF16, F16))
TRITON = Backend("triton", backends.triton.DEVICE, backends.triton.DTYPES)
# The GPU kernels take part where there is a GPU; on a CPU emulated (`make test-emulated`) and interpreted
# (`make test-triton`).
BACKENDS = tuple(b for b in (CPU, CUDA, TRITON) if b is CPU or b.missing() is None)


def parametrize_backends(reference: bool = False):
    """Parametrises a test with ``backend``: all under test, and the reference if asked for."""
    chosen = (REFERENCE, *BACKENDS) if reference else BACKENDS
    return pytest.mark.parametrize("backend", [pytest.param(b, id=b.name, marks=marks(b)) for b in chosen])


def parametrize_backends_and_dtypes(dtypes: tuple[torch.dtype, ...], reference: bool = False):
    """Parametrises a test with ``backend`` and ``dtype``: every pair of which the backend serves the dtype."""
    chosen = (REFERENCE, *BACKENDS) if reference else BACKENDS
    values = [
        pytest.param(b, dtype, id=f"{b.name}-{dtype_name(dtype)}", marks=marks(b))
        for b in chosen
        for dtype in dtypes
        if dtype in b.dtypes
    ]
    return pytest.mark.parametrize(("backend", "dtype"), values)


def marks(backend: Backend) -> tuple:
    """Skips a test where the backend cannot run."""
    reason = backend.missing()
    return () if reason is None else (pytest.mark.skip(reason=reason),)


needs_cpu_kernels = pytest.mark.skipif(backends.native.load_error is not None, reason=str(backends.native.load_error))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
