"""The decoders that the paper's Table 1a compares with its own: a UNet with and without skips, and a transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import PatchLayout
from ..nn import ConvNeXtV2Block, GRNVariant
from ..nn.init import init_linear_map
from ..ops._checks import check_positive

DECODERS = ("convnext", "unet", "unet-no-skip", "transformer")
_HEAD = 32  # channels of an attention head: the 16 heads of MAE's decoder of width 512


class TransformerDecoder(nn.Module):
    """MAE's decoder (He et al. 2022): pre-norm transformer blocks over all sites of stride 32, visible and hidden.

    PyTorch's :class:`torch.nn.TransformerEncoderLayer` with a hidden width of 4D, heads of 32 channels and GELU, then
    LayerNorm; a fixed sine-cosine position is added to each site. Weights start as MAE's, Xavier-uniform, biases at 0.

    Args:
        dim: D, the width. depth: blocks.

    Attributes:
        stride, out_dim: of the map that is returned.

    Raises:
        ValueError: ``dim`` is not a multiple of 4, or of 32 where it is more than that.
    """

    stride = 32

    def __init__(self, dim: int, depth: int):
        super().__init__()
        if check_positive("decoder_embed_dim", dim) % (_HEAD if dim > _HEAD else 4):
            raise ValueError(
                f"decoder_embed_dim must be a multiple of {_HEAD}, the channels of an attention head, for the "
                f"transformer decoder, got {dim}"
            )
        self.out_dim = dim
        heads = max(1, dim // _HEAD)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(check_positive("decoder_depth", depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, skips: Sequence[Tensor], layout: PatchLayout) -> Tensor:
        """``x [N, Gh, Gw, D]`` -> the same shape; ``skips`` and ``layout`` are not read."""
        n, height, width, dim = x.shape
        tokens = x.flatten(1, 2) + sine_cosine_positions(height, width, dim).to(x)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens).view(n, height, width, dim)


def sine_cosine_positions(height: int, width: int, dim: int) -> Tensor:
    """MAE's fixed positions of a map, float64 ``[height * width, dim]``, rows first: for column and row each, sines and
    then cosines of the index times ``10000^(-i / (dim / 4))``, i from 0 to dim / 4 - 1."""
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * rates for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


class UNetDecoder(nn.Module):
    """A hierarchical decoder over the encoder's stages, from stride 32 back to stride 4, with half the width each step.

    Level 0 is of stride 32 and width D; each further level upsamples by a transposed convolution, joins the encoder's
    stage of its stride where there are skips (projected to the level's width, a mask token where hidden, concatenated,
    and merged by a 1x1 convolution, as in a UNet), and runs ``depth`` ConvNeXt V2 blocks. Every site of stride 4
    predicts its own 4x4 pixels. The paper gives no details of its UNet.

    Args:
        dim: D, a multiple of 8. depth: blocks of each level. dims: widths of the encoder's stages.
        skips: whether the encoder's first three stages are joined. grn: of the blocks.

    Attributes:
        stride, out_dim: of the map that is returned.

    Raises:
        ValueError: ``dim`` is no multiple of 8.
    """

    stride = 4

    def __init__(self, dim: int, depth: int, dims: Sequence[int], skips: bool, grn: GRNVariant):
        super().__init__()
        if check_positive("decoder_embed_dim", dim) % 8:
            raise ValueError(
                "decoder_embed_dim must be a multiple of 8 for the UNet decoder, which halves it three times, got "
                f"{dim}"
            )
        self.skips = skips
        self.out_dim = dim // 8
        check_positive("decoder_depth", depth)
        self.levels = nn.ModuleList(
            _Level(dim >> level, depth, level > 0, dims[3 - level] if skips and level else None, grn)
            for level in range(4)
        )

    def forward(self, x: Tensor, skips: Sequence[Tensor], layout: PatchLayout) -> Tensor:
        """``x [N, H, W, D]`` of stride 32 -> ``[N, 8H, 8W, D/8]``; ``skips``: packed visible features of the encoder's
        stages of stride 4, 8 and 16, in this order."""
        joined = reversed(skips) if self.skips else (None,) * 3
        for level, skip in zip(self.levels, (None, *joined), strict=True):
            x = level(x, skip, layout)
        return x


class _Level(nn.Module):
    def __init__(self, dim: int, depth: int, up: bool, skip: int | None, grn: GRNVariant):
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * dim, dim, kernel_size=2, stride=2) if up else None
        self.skip = None if skip is None else nn.Linear(skip, dim)
        self.mask_token = None if skip is None else nn.Parameter(torch.empty(dim))
        self.merge = None if skip is None else nn.Linear(2 * dim, dim)
        self.blocks = nn.ModuleList(ConvNeXtV2Block(dim, grn=grn) for _ in range(depth))
        for layer in (self.up, self.skip, self.merge):
            if layer is not None:
                init_linear_map(layer)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, skip: Tensor | None, layout: PatchLayout) -> Tensor:
        if self.up is not None:
            x = self.up(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.skip is not None and self.merge is not None and skip is not None:
            rows = ops.linear(skip, self.skip.weight, self.skip.bias)
            joined = torch.cat((x, ops.scatter_patches(rows.to(x.dtype), layout, fill=self.mask_token)), dim=-1)
            x = ops.linear(joined, self.merge.weight, self.merge.bias)
        x = x.contiguous()
        for block in self.blocks:
            x = block(x)
        return x


def build_decoder(
    kind: str, dim: int, depth: int, dims: Sequence[int], grn: GRNVariant
) -> TransformerDecoder | UNetDecoder:
    """A decoder of :data:`DECODERS` but "convnext", which is a row of blocks of the model itself."""
    if kind == "transformer":
        return TransformerDecoder(dim, depth)
    return UNetDecoder(dim, depth, dims, kind == "unet", grn)
