"""The settings under which the gate counts, so that neither processor nor user shows in the numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from convnextv2_kernels.backends import cpu_gemm
from convnextv2_kernels.settings import override


@contextlib.contextmanager
def fixed() -> Iterator[None]:
    """One thread, the default schedule, and matrix products by ``mm``.

    The CPU backend multiplies by oneDNN where that is faster, which depends on the maker of the processor, and oneDNN
    asks PyTorch's allocator for scratch memory by instruction set.
    """
    threads = torch.get_num_threads()
    plain = mock.patch.multiple(cpu_gemm, _onednn=None, _onednn_backward=None, _onednn_add=None)
    with plain, override(save=None, chunk_bytes=None):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
