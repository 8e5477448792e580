"""Where the kernels' operators live, and random tensors for them."""

from __future__ import annotations

import torch
from torch import Tensor

import convnextv2_kernels as ck
from convnextv2_kernels import backends

from .setting import Setting


def namespace(setting: Setting):
    """``torch.ops.<namespace>`` of the CUDA kernels, of the emulated ones, or for work on this program of the CPU's."""
    return backends.get(setting.backend if setting.backend == "cuda" else "cpu").operators


class Draw:
    """Random features, parameters and layouts on a device; layouts are made once."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._layouts: dict[tuple, ck.PatchLayout] = {}

    def features(self, sets: int, *shape: int) -> Tensor:
        """``[sets, *shape]``: one tensor for each set of buffers."""
        return torch.randn(sets, *shape, device=self.device, dtype=self.dtype)

    def statistics(self, *shape: int) -> Tensor:
        """Positive float32 values."""
        return torch.rand(*shape, device=self.device) + 0.5

    def parameters(self, *shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, device=self.device)

    def layout(self, images: int, grid: int) -> ck.PatchLayout:
        """A uniform layout of FCMAE's mask ratio."""
        key = (images, grid)
        if key not in self._layouts:
            ids = ck.random_kept(images, (grid, grid), device=self.device)
            self._layouts[key] = ck.PatchLayout.from_kept(ids, (grid, grid))
        return self._layouts[key]
