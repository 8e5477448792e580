"""Parameters and multiply-adds of a network by its name, without weights: what ``info --model`` prints.

Multiply-adds of one image, forward, of matrix products and convolutions: the paper's FLOPs, half of FlopCounterMode's.
Every tap of a site counts, be it on padding or on a hidden site.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..layout import mask_fault, num_kept
from ..models import create_fcmae, create_model, get_config
from ..sizes import size_text

CHANNELS, CLASSES, DECODER_WIDTH, DECODER_BLOCKS = 3, 1000, 512, 1
STRIDE = 32


@dataclass(frozen=True)
class Part:
    """A part of a network. ``dense``, ``packed``: multiply-adds on all sites, and as FCMAE runs it on those of visible
    patches, None for a part that it lacks."""

    name: str
    parameters: int
    dense: int
    packed: int | None


@dataclass(frozen=True)
class ModelCounts:
    """Parts of the encoder, then the head of the classifier, and the decoder of the masked autoencoder.

    ``visible``, ``patches``: of an image, of ``patch_size`` pixels."""

    name: str
    img_size: tuple[int, int]
    patch_size: int
    visible: int
    patches: int
    encoder: tuple[Part, ...]
    head: Part
    decoder: Part

    def total(self, what: str, *more: Part) -> int:
        """Sum of ``parameters``, ``dense`` or ``packed`` of the encoder and more parts."""
        return sum(getattr(part, what) for part in (*self.encoder, *more))


def _block(sites: int, width: int) -> int:
    return sites * (49 * width + 2 * width * 4 * width)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_model(
    name: str, img_size: tuple[int, int] = (224, 224), patch_size: int = 32, mask_ratio: float = 0.6
) -> ModelCounts:
    """Counts of the classifier and the masked autoencoder called ``name``, on images of (height, width) ``img_size``.

    Raises:
        ValueError: an unknown name; sizes that are no multiples of ``patch_size``, or ``patch_size`` of 32; a mask
            that hides all patches or none.
    """
    if patch_size < 1 or patch_size % STRIDE:
        raise ValueError(f"patch_size must be a multiple of {STRIDE}, got {patch_size}")
    if any(side < 1 or side % patch_size for side in img_size):
        raise ValueError(f"img_size must be multiples of patch_size {patch_size}, got {img_size[0]}x{img_size[1]}")
    grid = img_size[0] // patch_size, img_size[1] // patch_size
    if (fault := mask_fault(grid, mask_ratio, patch_size)) is not None:
        raise ValueError(fault)
    depths, dims = get_config(name)
    with torch.device("meta"):
        model, fcmae = create_model(name, num_classes=CLASSES), create_fcmae(name)
    visible, patches = num_kept(grid, mask_ratio), grid[0] * grid[1]

    def stage(i: int, sites: int) -> int:
        rows, fan_in = sites << 2 * (3 - i), 16 * CHANNELS if i == 0 else 4 * dims[i - 1]
        return rows * fan_in * dims[i] + depths[i] * _block(rows, dims[i])

    def decoder(encoded: int) -> int:
        mapped = all_sites * (DECODER_WIDTH * STRIDE**2 * CHANNELS)
        return encoded * dims[3] * DECODER_WIDTH + DECODER_BLOCKS * _block(all_sites, DECODER_WIDTH) + mapped

    # sites of the last stage
    per_patch = (patch_size // STRIDE) ** 2
    all_sites, seen = patches * per_patch, visible * per_patch
    encoder = tuple(
        Part(
            ("stem and " if i == 0 else "downsampling and ") + f"stage {i + 1}, {depths[i]} x {dims[i]}",
            _parameters(model.downsample_layers[i]) + _parameters(model.stages[i]),
            stage(i, all_sites),
            stage(i, seen),
        )
        for i in range(4)
    )
    classes = dims[3] * CLASSES
    head = Part(f"norm and head, {CLASSES} classes", _parameters(model.norm) + _parameters(model.head), classes, None)
    kept = _parameters(fcmae) - _parameters(fcmae.encoder)
    blocks = f"decoder, {DECODER_BLOCKS} x {DECODER_WIDTH}"
    return ModelCounts(
        name,
        img_size,
        patch_size,
        visible,
        patches,
        encoder,
        head,
        Part(blocks, kept, decoder(all_sites), decoder(seen)),
    )


def describe(counts: ModelCounts) -> str:
    """A table for people."""
    rows = [("", "parameters", "dense", "packed")]

    def add(name: str, parameters: int, dense: int, packed: int | None) -> None:
        cells = ("" if n is None else f"{n / 1e9:,.3f} G" for n in (dense, packed))
        rows.append((name, f"{parameters:,}", *cells))

    for part in (*counts.encoder, counts.head, counts.decoder):
        add(f"  {part.name}", part.parameters, part.dense, part.packed)
    for name, last in (("classifier: encoder and head", counts.head), ("FCMAE: encoder and decoder", counts.decoder)):
        packed = None if last.packed is None else counts.total("packed", last)
        add(name, counts.total("parameters", last), counts.total("dense", last), packed)
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{counts.name}, one image of {size_text(counts.img_size)} pixels, forward; "
        "multiply-adds, as the paper counts FLOPs",
        "",
    ]
    lines += [f"{name:<{width}}{p:>15}{dense:>13}{packed:>13}".rstrip() for name, p, dense, packed in rows]
    lines += [
        "",
        f"packed: {counts.visible} of {counts.patches} patches of {counts.patch_size} pixels are visible; every tap "
        "of a visible site counts.",
        "FlopCounterMode counts two operations for each multiply-add.",
    ]
    return "\n".join(lines)
