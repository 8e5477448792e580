"""Patches of pixels as row vectors, in the order of the FCMAE decoder's predictions.

Entry ``(p * side + q) * channels + c`` of a row is channel c of the pixel at row p, column q of the
patch.
"""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..layout import PatchLayout


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """``images [N, C, H, W]`` -> ``[N, L, patch_size^2 * C]``, patches in row-major order.

    Raises:
        ValueError: images that are not 4-D, or sides that are not multiples of ``patch_size``.
    """
    if images.dim() != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"images must have shape [N, C, H, W] with sides that are multiples of {patch_size}, "
            f"got {list(images.shape)}"
        )
    n, c, h, w = images.shape
    rows, columns = h // patch_size, w // patch_size
    x = images.reshape(n, c, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(n, rows * columns, patch_size * patch_size * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """``patches [N, L, patch_size^2 * C]`` of a ``grid`` of L patches -> images ``[N, C, H, W]``.

    Raises:
        ValueError: patches of another shape.
    """
    rows, columns = grid
    area = patch_size * patch_size
    if patches.dim() != 3 or patches.shape[1] != rows * columns or patches.shape[2] % area:
        raise ValueError(
            f"patches must have shape [N, {rows * columns}, {area} * C] for grid {rows}x{columns} "
            f"and patch_size {patch_size}, got {list(patches.shape)}"
        )
    n, c = patches.shape[0], patches.shape[2] // area
    x = patches.reshape(n, rows, columns, patch_size, patch_size, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(n, c, rows * patch_size, columns * patch_size)


def gather_pixels(images: Tensor, layout: PatchLayout) -> Tensor:
    """The patches of ``images [N, C, H, W]`` in ``layout``: ``[P, patch_size^2 * C]``."""
    return ops.gather_patches(images.permute(0, 2, 3, 1), layout).flatten(1)


def pixel_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[..., 1]`` of patches ``[..., D]``: unbiased variance plus 1e-6, inside
    the root."""
    mean = patches.mean(dim=-1, keepdim=True)
    # torch.var is an order of magnitude slower on a CPU, and warns if there is no patch.
    var = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (var + 1e-6).sqrt()
