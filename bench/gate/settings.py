"""The settings under which the gate counts, so that neither processor nor user shows in the numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch

from convnextv2_kernels.backends import cpu_gemm

_UNSET = ("CONVNEXTV2_KERNELS_SAVE", "CONVNEXTV2_KERNELS_CHUNK_BYTES")


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Environment variables for a while; None unsets one."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def fixed() -> Iterator[None]:
    """One thread, the default schedule, and matrix products by ``mm``.

    The CPU backend multiplies by oneDNN where that is faster, which depends on the maker of the processor, and oneDNN
    asks PyTorch's allocator for scratch memory by instruction set.
    """
    threads = torch.get_num_threads()
    plain = mock.patch.multiple(cpu_gemm, _onednn=None, _onednn_backward=None, _onednn_add=None)
    with plain, environment(**dict.fromkeys(_UNSET)):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
