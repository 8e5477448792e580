"""Argument checks shared by the models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import PatchLayout
from ..nn._checks import check_positive


def check_stages(depths: Sequence[int], dims: Sequence[int]) -> None:
    """Four positive depths and four positive widths."""
    for name, values in (("depths", depths), ("dims", dims)):
        if len(values) != 4:
            raise ValueError(f"{name} must have one entry per stage, 4 in all, got {tuple(values)}")
        for stage, value in enumerate(values):
            check_positive(f"{name}[{stage}]", value)


def check_images(images: Tensor, in_chans: int, multiple: int, any_size: bool = False) -> None:
    """Floating-point ``[N, in_chans, H, W]`` with H and W multiples of ``multiple``, or with
    ``any_size`` at least that."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if not images.dtype.is_floating_point:
        raise TypeError(f"images must be of a floating-point dtype, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images must have shape [N, {in_chans}, H, W], got {list(images.shape)}")
    height, width = images.shape[2:]
    if any_size:
        if min(height, width) < multiple:
            raise ValueError(f"images must have sides of at least {multiple} pixels, got {height}x{width}")
    elif height % multiple or width % multiple or not height or not width:
        raise ValueError(f"images must have sides that are multiples of {multiple}, got {height}x{width}")


def check_layout(layout: PatchLayout, images: Tensor) -> None:
    """The layout divides these images into square patches whose side is a multiple of 32."""
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout must be a PatchLayout, got {type(layout).__name__}")
    if layout.num_images != images.shape[0]:
        raise ValueError(f"layout is of {layout.num_images} images, but images holds {images.shape[0]}")
    (rows, columns), (height, width) = layout.grid, images.shape[2:]
    patch = height // rows
    if patch % 32 or not patch or (rows * patch, columns * patch) != (height, width):
        raise ValueError(
            f"layout has a grid of {rows}x{columns} patches, which does not divide images of "
            f"{height}x{width} into square patches with a side that is a multiple of 32"
        )
    if layout.device != images.device:
        raise ValueError(f"layout is on {layout.device}, but images is on {images.device}")


def as_layout(mask: Tensor | PatchLayout, num_images: int, grid: tuple[int, int], device: torch.device) -> PatchLayout:
    """Layout of a mask ``[N, Gh, Gw]`` or ``[N, Gh*Gw]``, bool or 0/1 with 1 = hidden, or of a
    ready layout."""
    if isinstance(mask, PatchLayout):
        if mask.num_images != num_images or tuple(mask.grid) != grid:
            raise ValueError(
                f"mask is a layout of {mask.num_images} images on grid {tuple(mask.grid)}, but "
                f"images holds {num_images} on grid {grid}"
            )
        if mask.device != device:
            raise ValueError(f"mask is on {mask.device}, but images is on {device}")
        return mask
    return PatchLayout.from_mask(as_bool_mask(mask, num_images, grid, device))


def as_bool_mask(mask: Tensor, num_images: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """``[N, Gh, Gw]`` bool of a mask in any of the accepted forms."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor or a PatchLayout, got {type(mask).__name__}")
    rows, columns = grid
    accepted = ([num_images, rows, columns], [num_images, rows * columns])
    if list(mask.shape) not in accepted:
        raise ValueError(f"mask must have shape {accepted[0]} or {accepted[1]}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}, but images is on {device}")
    if mask.dtype != torch.bool:
        hidden = mask == 1
        if not bool((hidden | (mask == 0)).all()):
            raise ValueError("mask must hold only 0 (visible) and 1 (hidden), got other values")
        mask = hidden
    return mask.reshape(num_images, rows, columns)
