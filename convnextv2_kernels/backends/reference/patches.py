"""Reference of the moves between dense maps and packed patches, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ...layout import PatchLayout


def gather_patches(x: Tensor, layout: PatchLayout) -> Tensor:
    """``[N, Gh*s, Gw*s, C]`` -> visible patches ``[P, s, s, C]``."""
    n, h, _w, c = x.shape
    gh, gw = layout.grid
    s = h // gh
    patches = x.reshape(n, gh, s, gw, s, c).permute(0, 1, 3, 2, 4, 5).reshape(n * gh * gw, s, s, c)
    return patches.index_select(0, layout.patch_of_slot)


def scatter_patches(x: Tensor, layout: PatchLayout, fill: Tensor | None) -> Tensor:
    """Packed ``[P, s, s, C]`` -> dense ``[N, Gh*s, Gw*s, C]``; hidden sites hold ``fill [C]`` or zero."""
    _, s, _, c = x.shape
    gh, gw = layout.grid
    total = layout.num_images * gh * gw
    dense = x.new_zeros(total, s, s, c) if fill is None else fill.to(x.dtype).reshape(1, 1, 1, c).expand(total, s, s, c)
    dense = dense.index_copy(0, layout.patch_of_slot.long(), x)
    grid = dense.reshape(layout.num_images, gh, gw, s, s, c).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(layout.num_images, gh * s, gw * s, c)
