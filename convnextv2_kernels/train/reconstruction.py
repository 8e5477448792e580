"""Reconstructions: how good they are in pixels, and what they look like."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._console import plotted
from .._files import PNG_METADATA, atomic_file
from ..data.images import denormalize, normalize
from ..data.rng import MASK_EVAL, torch_stream
from ..layout import mask_fault, random_mask

HIDDEN_GREY = 0.5


@dataclass(frozen=True)
class Reconstruction:
    """Images [N, H, W, 3] in 0..1 and mean squared errors over their hidden pixels, same unit.

    ``model_mse``: of the model. ``visible_mean_mse``: of the mean colour of an image's visible
    pixels, the trivial prediction. ``patch_mean_mse``: of each hidden patch's own mean colour,
    which only an oracle knows.
    """

    originals: Tensor
    masked: Tensor
    reconstructed: Tensor
    model_mse: float
    visible_mean_mse: float
    patch_mean_mse: float


@torch.no_grad()
def reconstruct(model: nn.Module, pixels: Tensor, mask: Tensor) -> Reconstruction:
    """Fill the hidden patches of ``pixels`` uint8 [N, H, W, 3] by the model's predictions.

    ``mask`` [N, Gh, Gw] bool, True = hidden. A model trained with ``norm_pix_loss`` predicts
    patches of mean 0 and deviation 1; the mean and deviation put back are then those of the hidden
    patch itself, so that neither picture nor error says anything about its colour.
    """
    weight = next(model.parameters())
    device = weight.device
    training = model.training
    model.eval()
    try:
        images = normalize(pixels.to(device)).to(weight.dtype)
        _, pred, _ = model(images, mask.to(device))
        filled = denormalize(model.reconstruct(images, pred, mask.to(device))).clamp(0, 1).cpu()
    finally:
        model.train(training)
    originals = pixels.cpu().float() / 255
    hidden = _pixel_mask(mask.cpu(), originals)
    patch_means = _patch_means(originals, mask.shape[1:])
    count = (~hidden).sum((1, 2), keepdim=True)
    visible_mean = (originals * ~hidden).sum((1, 2), keepdim=True) / count.clamp(min=1)
    return Reconstruction(
        originals=originals,
        masked=torch.where(hidden, HIDDEN_GREY, originals),
        reconstructed=torch.where(hidden, filled, originals),
        model_mse=_hidden_mse(filled, originals, hidden),
        visible_mean_mse=_hidden_mse(visible_mean.expand_as(originals), originals, hidden),
        patch_mean_mse=_hidden_mse(patch_means, originals, hidden),
    )


def draw_masks(num_images: int, grid: tuple[int, int], ratio: float, seed: int) -> Tensor:
    """Random masks ``[N, Gh, Gw]`` bool, True = hidden.

    The mask of image i is a pure function of (seed, i): it is the same for any number of images.

    Raises:
        ValueError: no image, or a ratio that hides all or none of an image's patches.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images!r}")
    if (fault := mask_fault(grid, ratio)) is not None:
        raise ValueError(fault)
    return torch.cat([random_mask(1, grid, ratio, torch_stream(seed, MASK_EVAL, i)) for i in range(num_images)])


def errors_by_image(result: Reconstruction, mask: Tensor) -> list[float]:
    """Mean squared error over the hidden pixels of each image, 0..1 scale; NaN where nothing is hidden.

    ``mask [N, Gh, Gw]``: as given to :func:`reconstruct`, which computed
    ``result``.
    """
    n, height, width, _ = result.originals.shape
    rows, columns = height // mask.shape[1], width // mask.shape[2]
    hidden = mask.cpu().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    error = (result.reconstructed - result.originals).double().square().mean(-1)
    return [error[i][hidden[i]].mean().item() for i in range(n)]


def describe_errors(result: Reconstruction) -> list[str]:
    """Return the three errors as lines of text, the model's first."""
    return [
        f"{mse:.4f}  {name}"
        for mse, name in (
            (result.model_mse, "the model"),
            (result.visible_mean_mse, "the mean colour of the image's visible pixels"),
            (result.patch_mean_mse, "each hidden patch's own mean colour (known only to an oracle)"),
        )
    ]


def _pixel_mask(mask: Tensor, images: Tensor) -> Tensor:
    """Spread a patch mask [N, Gh, Gw] over pixels: [N, H, W, 1]."""
    rows, columns = images.shape[1] // mask.shape[1], images.shape[2] // mask.shape[2]
    return mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[..., None]


def _patch_means(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Paint each patch of [N, H, W, 3] in its mean colour."""
    n, height, width, channels = images.shape
    rows, columns = grid
    patches = images.view(n, rows, height // rows, columns, width // columns, channels)
    return patches.mean((2, 4), keepdim=True).expand_as(patches).reshape(images.shape)


def _hidden_mse(prediction: Tensor, target: Tensor, hidden: Tensor) -> float:
    error = (prediction - target).square().mean(-1, keepdim=True)
    return (error * hidden).sum().item() / max(1, int(hidden.sum()))


def save_picture(path: Path, result: Reconstruction, title: str) -> None:
    """Draw originals, masked inputs and reconstructions as three titled rows of a PNG."""
    # A Figure of one's own, not pyplot: no display, no global state.
    from matplotlib.figure import Figure

    rows = (
        ("Original", result.originals),
        ("Input (grey: hidden)", result.masked),
        ("Reconstruction of the hidden patches, beside the visible ones", result.reconstructed),
    )
    n, height, width, _ = result.originals.shape
    cell, caption, top = 1.5, 0.25, 0.5  # inches
    row = cell * height / width + caption
    figure = Figure(figsize=(cell * n, 3 * row + top), dpi=140)
    figure.suptitle(plotted(title), fontsize=10, y=1 - 0.12 / (3 * row + top), va="top")
    axes = figure.subplots(3, n, squeeze=False)
    figure.subplots_adjust(
        left=0.005,
        right=0.995,
        bottom=0.005,
        top=1 - (top + caption) / (3 * row + top),
        wspace=0.03,
        hspace=caption / (row - caption),
    )
    for (name, images), strip in zip(rows, axes, strict=True):
        strip[0].set_title(name, fontsize=9, loc="left", pad=4)
        for axis, image in zip(strip, images, strict=True):
            axis.imshow(image.numpy())
            axis.set_axis_off()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata=PNG_METADATA)
