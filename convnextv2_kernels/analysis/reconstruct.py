"""Reconstructions of given images by a trained FCMAE (ConvNeXt V2 paper, section 2), and their errors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.rng import MASK_EVAL, torch_stream
from ..layout import random_mask
from ..train.reconstruction import Reconstruction


def draw_masks(num_images: int, grid: tuple[int, int], ratio: float, seed: int) -> Tensor:
    """Random masks ``[N, Gh, Gw]`` bool, True = hidden.

    The mask of image i is a pure function of (seed, i): it is the same for any number of images.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images!r}")
    return torch.cat([random_mask(1, grid, ratio, torch_stream(seed, MASK_EVAL, i)) for i in range(num_images)])


def errors_by_image(result: Reconstruction, mask: Tensor) -> list[float]:
    """Mean squared error over the hidden pixels of each image, 0..1 scale; NaN where nothing is hidden.

    ``mask [N, Gh, Gw]``: as given to :func:`~convnextv2_kernels.train.reconstruction.reconstruct`, which computed
    ``result``.
    """
    n, height, width, _ = result.originals.shape
    rows, columns = height // mask.shape[1], width // mask.shape[2]
    hidden = mask.cpu().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    error = (result.reconstructed - result.originals).double().square().mean(-1)
    return [error[i][hidden[i]].mean().item() for i in range(n)]
