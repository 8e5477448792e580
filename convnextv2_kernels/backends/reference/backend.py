"""The reference as a backend: it runs everything, everywhere, and has no kernels."""

from __future__ import annotations

import torch

from ..base import Backend


class ReferenceBackend(Backend):
    """Plain PyTorch, differentiated by PyTorch: the functions of this folder, which the ops call themselves."""

    name = "reference"

    def unsupported_reason(self, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
        return None
