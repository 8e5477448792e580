"""Minimum work of each op, forward and backward together, so that times become rates.

Flops are the multiplications and additions of convolutions and matrix products, nothing else:
elementwise work is limited by memory and shows in the bytes. Bytes are those that must move when
every tensor crosses memory once per pass and nothing is recomputed: forward reads its input and
writes its output, backward reads the output's gradient and the input and writes the input's
gradient. Weights are read in both passes and their gradients written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAPS = 5  # input, output, output's gradient, input again, input's gradient
WEIGHT_PASSES = 3  # read in forward, read in backward, gradient written


@dataclass(frozen=True)
class Work:
    """Flops and bytes of one call, forward and backward."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def rates(self, milliseconds: float) -> dict[str, float]:
        """GFLOP/s and GB/s (10^9) when a call takes ``milliseconds``."""
        return {"gflops": self.flops / milliseconds * 1e-6, "gbytes": self.bytes / milliseconds * 1e-6}


def axis_pairs(side: int, kernel_size: int) -> list[int]:
    """Pairs (site, tap) along one axis, by the patch the tap falls in: offset -r .. r."""
    reach = kernel_size // 2
    radius = -(-reach // side)
    counts = [0] * (2 * radius + 1)
    for site in range(side):
        for tap in range(-reach, reach + 1):
            counts[(site + tap) // side + radius] += 1
    return counts


def visible_taps(mask: Tensor, side: int, kernel_size: int = 7) -> int:
    """Pairs of a visible output site and a visible site under its kernel, over the batch.

    Args:
        mask: [N, Gh, Gw] bool, True = hidden.
        side: sites along one side of a patch.
    """
    pairs = torch.tensor(axis_pairs(side, kernel_size), dtype=torch.float64)
    visible = (~mask).cpu().to(torch.float64)[:, None]
    weight = torch.outer(pairs, pairs)[None, None]
    # In float64 the counts are whole numbers far below 2^53, hence exact.
    neighbours = F.conv2d(visible, weight, padding=len(pairs) // 2)
    return int((neighbours * visible).sum().item())


def depthwise_conv(rows: int, taps: int, width: int, kernel_size: int = 7, itemsize: int = 4) -> Work:
    """Depthwise convolution of ``rows`` sites with ``taps`` (site, tap) pairs and a bias."""
    weights = width * (kernel_size**2 + 1)
    bytes_moved = itemsize * (MAPS * rows * width + WEIGHT_PASSES * weights)
    return Work(3 * 2 * taps * width, bytes_moved)


def layer_norm(rows: int, width: int, itemsize: int = 4) -> Work:
    """Layer normalisation of ``rows`` sites."""
    return Work(0, itemsize * (MAPS * rows * width + WEIGHT_PASSES * 2 * width))


def depthwise_conv_layer_norm(rows: int, taps: int, width: int, kernel_size: int = 7, itemsize: int = 4) -> Work:
    """Convolution and normalisation fused: the map between them is never moved."""
    conv = depthwise_conv(rows, taps, width, kernel_size, itemsize)
    return conv + Work(0, itemsize * WEIGHT_PASSES * 2 * width)


def gelu_grn(rows: int, width: int, itemsize: int = 4) -> Work:
    """GELU and GRN fused, with the two passes of GRN over a map that stays in the cache."""
    return layer_norm(rows, width, itemsize)


def layer_norm_grn(rows: int, width: int, itemsize: int = 4) -> Work:
    """LayerNorm and GRN fused: what GRN reads a second time stays in the cache."""
    return Work(0, itemsize * (MAPS * rows * width + WEIGHT_PASSES * 4 * width))


def gathered(rows: int, all_rows: int, width: int, itemsize: int = 4) -> Work:
    """Copy of the visible ones of ``all_rows`` rows; backward writes the whole map, with zeros elsewhere."""
    return Work(0, itemsize * width * (3 * rows + all_rows))


def scattered(rows: int, all_rows: int, width: int, itemsize: int = 4) -> Work:
    """Copy of rows to their places in a map of ``all_rows``, with a fill elsewhere; backward reads the rows alone."""
    return Work(0, itemsize * width * (3 * rows + all_rows))


def matrix_product(rows: int, fan_in: int, fan_out: int, itemsize: int = 4, input_grad: bool = True) -> Work:
    """``rows`` x ``fan_in`` by ``fan_in`` x ``fan_out`` with a bias."""
    maps = rows * (fan_in * (3 if input_grad else 2) + 2 * fan_out)
    weights = WEIGHT_PASSES * fan_out * (fan_in + 1)
    products = 3 if input_grad else 2
    return Work(products * 2 * rows * fan_in * fan_out, itemsize * (maps + weights))


def pointwise_mlp(rows: int, width: int, hidden: int, itemsize: int = 4) -> Work:
    """Two pointwise layers with GELU and GRN between them; the hidden map is never moved."""
    flops = 2 * 3 * 2 * rows * width * hidden
    weights = 2 * width * hidden + 3 * hidden + width
    return Work(flops, itemsize * (MAPS * rows * width + WEIGHT_PASSES * weights))


def gathered_pointwise_mlp(
    rows: int, all_rows: int, width: int, hidden: int, itemsize: int = 4, layer_norm: bool = False
) -> Work:
    """The MLP of visible rows, read from a map of ``all_rows`` rows; their gradient is a map, zero elsewhere."""
    vectors = WEIGHT_PASSES * 2 * width if layer_norm else 0
    return pointwise_mlp(rows, width, hidden, itemsize) + Work(0, itemsize * ((all_rows - rows) * width + vectors))


def patch_embed(rows: int, width: int, itemsize: int = 4, in_chans: int = 3, layer_norm: bool = False) -> Work:
    """The stem, whose images need no gradient, and LayerNorm, if any, without a map between them."""
    norm = Work(0, itemsize * WEIGHT_PASSES * 2 * width if layer_norm else 0)
    return matrix_product(rows, 16 * in_chans, width, itemsize, input_grad=False) + norm


def downsample(rows: int, width: int, out_width: int, itemsize: int = 4) -> Work:
    """Layer normalisation and 2x2 convolution of stride 2; ``rows`` are those of the input."""
    norm = Work(0, itemsize * WEIGHT_PASSES * 2 * width)
    return matrix_product(rows // 4, 4 * width, out_width, itemsize) + norm


def block(rows: int, taps: int, width: int, itemsize: int = 4) -> Work:
    """A whole ConvNeXt V2 block; nothing but its input and output is moved."""
    conv = depthwise_conv_layer_norm(rows, taps, width, itemsize=itemsize)
    mlp = pointwise_mlp(rows, width, 4 * width, itemsize)
    return conv + mlp + Work(0, -itemsize * MAPS * rows * width)


def fcmae_step(
    mask: Tensor,
    depths: Sequence[int],
    dims: Sequence[int],
    dense: bool = False,
    in_chans: int = 3,
    decoder_width: int = 512,
    decoder_depth: int = 1,
) -> float:
    """Flops of an FCMAE training step with 32-pixel patches.

    Args:
        mask: [N, Gh, Gw] bool, True = hidden.
        dense: count every site of the encoder, as masked dense execution computes.
    """
    patches, hidden = mask.numel(), int(mask.sum())
    everything = torch.zeros_like(mask)
    encoded = everything if dense else mask
    sites = int((~encoded).sum())
    total = matrix_product(sites * 64, 16 * in_chans, dims[0], input_grad=False).flops
    for stage, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        side = 8 >> stage
        rows = sites * side * side
        if stage:
            total += downsample(rows * 4, dims[stage - 1], width).flops
        total += depth * block(rows, visible_taps(encoded, side), width).flops
    total += matrix_product(sites, dims[-1], decoder_width).flops
    decoder = block(patches, visible_taps(everything, 1), decoder_width)
    total += decoder_depth * decoder.flops
    # Every patch is predicted, but only hidden ones enter the loss and pass a gradient back.
    return total + 2 * decoder_width * 32 * 32 * in_chans * (patches + 2 * hidden)
