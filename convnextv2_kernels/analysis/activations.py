"""Activation maps of one layer for one image (ConvNeXt V2 paper, Figure 3), with dead and saturated ones marked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._console import plotted
from .._files import PNG_METADATA, atomic_file
from ..data.rng import ORDER, numpy_stream
from .channels import DEAD, SATURATED, channels_near_constant, channels_near_zero, rows_by_image
from .features import TAPS, block_names, check_taps, tapped

SCALES = ("shared", "map")
_RED, _ORANGE = "#dc2626", "#f59e0b"


@dataclass(frozen=True)
class ActivationMaps:
    """Some maps of one layer, and what all of its channels do.

    ``channels``: int64 ``[K]``, ascending, the channels shown. ``maps``: float32 ``[K, H, W]`` on the CPU. ``dead``,
    ``saturated``: bool ``[C]`` over all channels of the layer, see :mod:`.channels`. ``mean``, ``std``, ``largest``:
    float64 ``[C]`` over the sites: mean, deviation, greatest absolute value.
    """

    layer: str
    tap: str
    channels: Tensor
    maps: Tensor
    dead: Tensor
    saturated: Tensor
    mean: Tensor
    std: Tensor
    largest: Tensor

    @property
    def dead_share(self) -> float:
        """Share of all channels of the layer, 0..1."""
        return self.dead.double().mean().item()

    @property
    def saturated_share(self) -> float:
        """Share of all channels of the layer, 0..1."""
        return self.saturated.double().mean().item()


def activation_maps(
    model: nn.Module,
    image: Tensor,
    layer: str,
    tap: str = "grn",
    channels: int = 64,
    seed: int | None = None,
    dead: float = DEAD,
    saturated: float = SATURATED,
) -> ActivationMaps:
    """Maps of ``channels`` channels of one block for one whole image.

    Args:
        image: normalised ``[1, 3, H, W]`` or ``[3, H, W]`` on the model's device.
        layer: name of a block, ``stages.<stage>.<block>``. tap: see :data:`.features.TAPS`.
        channels: how many; all where the layer has fewer. seed: of a random choice; None takes the first ones.
        dead, saturated: thresholds, see :mod:`.channels`.

    Raises:
        ValueError: an argument out of range.
    """
    check_taps([tap], "tap")
    image = image[None] if image.dim() == 3 else image
    if image.shape[0] != 1:
        raise ValueError(f"image must be one image [3, H, W] or [1, 3, H, W], got {list(image.shape)}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels!r}")
    if layer not in (names := block_names(model)):
        raise ValueError(f"layer must be a block from {names[0]} to {names[-1]}, got {layer!r}")
    features = next(found.features for found in tapped(model, image, taps=(tap,)) if found.name == layer)
    (rows,) = rows_by_image(features.cpu())
    width = rows.shape[1]
    chosen = torch.arange(min(channels, width))
    if seed is not None:
        draw = numpy_stream(seed, ORDER).permutation(width)[: len(chosen)]
        chosen = torch.from_numpy(draw).sort().values
    std, mean = torch.std_mean(rows.double(), dim=0, correction=0)
    return ActivationMaps(
        layer=layer,
        tap=tap,
        channels=chosen,
        maps=features[0].cpu().float().permute(2, 0, 1)[chosen].contiguous(),
        dead=channels_near_zero(rows, dead),
        saturated=channels_near_constant(rows, saturated, dead),
        mean=mean,
        std=std,
        largest=rows.abs().amax(dim=0).double(),
    )


def save_activation_maps(path: Path, result: ActivationMaps, pixels: Tensor, title: str, scale: str = "shared") -> None:
    """Draw the image and its maps as a PNG; dead maps carry a red cross, saturated ones an orange frame.

    Args:
        pixels: the image, uint8 ``[H, W, 3]``.
        scale: "shared" colours all maps by one scale, so that a weak map looks weak. "map" stretches each map from its
            own least to its own greatest value, which shows shapes and hides dead maps.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    count, height, width = result.maps.shape
    columns = min(count, max(8, round(count**0.5)))
    grid_rows = -(-count // columns)
    maps = result.maps
    if scale == "map":
        low = maps.amin((1, 2), keepdim=True)
        maps = (maps - low) / (maps.amax((1, 2), keepdim=True) - low).clamp(min=torch.finfo(maps.dtype).tiny)
    tall, wide = height * 1.08, width * 1.08  # a gap beside and below each map
    side = 6.0
    panel = side * grid_rows * tall / (columns * wide)
    figure = Figure(figsize=(4.6 + side, max(panel, 2.6) + 1.25), dpi=120, layout="constrained")
    figure.suptitle(plotted(title), fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=(2.6, side))
    left.imshow(pixels.numpy())
    left.set_title(f"image, {pixels.shape[1]}x{pixels.shape[0]} px", fontsize=9)
    left.set_axis_off()
    limits = {"vmin": float(maps.min()), "vmax": float(maps.max())}
    if limits["vmin"] == limits["vmax"]:
        limits["vmax"] += 1
    for number, (channel, one) in enumerate(zip(result.channels.tolist(), maps, strict=True)):
        x, y = number % columns * wide, number // columns * tall
        box = (x, x + width, y + height, y)
        drawn = right.imshow(one.numpy(), extent=box, cmap="viridis", interpolation="nearest", **limits)
        if result.dead[channel]:
            right.plot([x, x + width], [y, y + height], [x, x + width], [y + height, y], color=_RED, lw=0.9)
        if result.dead[channel] or result.saturated[channel]:
            color = _RED if result.dead[channel] else _ORANGE
            right.plot([x, x + width, x + width, x, x], [y, y, y + height, y + height, y], color=color, lw=1.2)
    right.set_xlim(-0.02 * wide, columns * wide)
    right.set_ylim(grid_rows * tall, -0.02 * tall)
    right.set_axis_off()
    right.set_aspect("equal")
    right.set_title(
        f"{result.layer}, {TAPS[result.tap]}: {count} of {len(result.dead)}, {width}x{height} sites", fontsize=9
    )
    bar = figure.colorbar(drawn, ax=right, fraction=0.03, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("activation, one scale" if scale == "shared" else "least to greatest of each map", fontsize=8)
    shown_dead, shown_saturated = int(result.dead[result.channels].sum()), int(result.saturated[result.channels].sum())
    figure.legend(
        handles=[
            Patch(
                edgecolor=_RED,
                facecolor="none",
                label=f"dead (crossed): {shown_dead} shown, {result.dead_share:.1%} of all channels",
            ),
            Patch(
                edgecolor=_ORANGE,
                facecolor="none",
                label=f"saturated: {shown_saturated} shown, {result.saturated_share:.1%} of all channels",
            ),
        ],
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata=PNG_METADATA)
