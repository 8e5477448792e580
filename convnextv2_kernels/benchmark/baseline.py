"""Masked dense baseline: FCMAE in plain PyTorch, every site computed and hidden ones multiplied by zero.

It loads the state_dict of our FCMAE and computes the same loss to rounding (GRN scope "image").
Each choice below was the fastest of the plain PyTorch spellings measured on a CPU:

* the mask is applied in place where autograd allows it, and only where it changes the result: after
  the stem, each downsampling, GELU (GRN sees visible sites only) and the second pointwise layer;
* GRN is a norm, a product and an in-place sum, not the official four passes over the hidden width;
* layer normalisation of a channels_last map is a view, never a copy;
* the pointwise layers exist as ``nn.Linear`` on NHWC rows (MKL) and as 1x1 convolutions (oneDNN).

The kind "plain" is the network as it is commonly written instead: ``nn.Linear``, the official GRN and
mask products out of place after every convolution and block. It shows what the choices above are worth.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
PATCH = 32
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
POINTWISE = ("plain", "linear", "conv1x1")


@dataclass(frozen=True)
class Baseline:
    """One way to write the masked dense network: memory format of the maps, and pointwise layers."""

    layout: str
    pointwise: str

    def __post_init__(self) -> None:
        if self.layout not in MEMORY_FORMATS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {list(MEMORY_FORMATS)}")
        if self.pointwise not in POINTWISE:
            raise ValueError(f"pointwise is {self.pointwise!r}, expected one of {list(POINTWISE)}")

    @property
    def name(self) -> str:
        """Name in tables and JSON, such as ``dense channels_last conv1x1``."""
        return f"dense {self.layout} {self.pointwise}"


def baselines(kinds: Sequence[str] = POINTWISE) -> list[Baseline]:
    """Each memory format with each of these kinds of pointwise layers: six by default."""
    return [Baseline(layout, kind) for layout in MEMORY_FORMATS for kind in kinds]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor, kind: str) -> Tensor:
    """Map the last axis of x [N, H, W, C] with weight [D, C] to [N, H, W, D]."""
    if kind != "conv1x1":
        return F.linear(x, weight, bias)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1)


def masked_grn(h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Global response normalisation per image of h [N, H, W, C], zero at hidden sites."""
    # Flattened sites, a product and an in-place sum: no other spelling tried was faster.
    norm = torch.linalg.vector_norm(h.flatten(1, 2), dim=1, dtype=gamma.dtype)[:, None, None]
    scale = 1 + gamma * (norm / (norm.mean(-1, keepdim=True) + EPS))
    return (h * scale.to(h.dtype)).add_(beta.to(h.dtype))


def official_grn(h: Tensor, gamma: Tensor, beta: Tensor, keep: Tensor | None) -> Tensor:
    """The same as the official dense code spells it, with the norm over visible sites."""
    seen = h if keep is None else h * keep
    norm = torch.norm(seen, p=2, dim=(1, 2), keepdim=True)
    response = norm / (norm.mean(dim=-1, keepdim=True) + EPS)
    return gamma * (h * response) + beta + h


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer normalisation over the channels of an NCHW map; returns NHWC, free of copies from
    channels_last."""
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, EPS)


def masked_mlp(y: Tensor, mlp: Sequence[Tensor], keep: Tensor | None, kind: str) -> Tensor:
    """Pointwise layers of a block on an NHWC map; the result is zero where ``keep`` is.

    ``mlp``: w1, b1, GRN's gamma and beta, w2, b2."""
    w1, b1, gamma, beta, w2, b2 = mlp
    h = F.gelu(pointwise(y, w1, b1, kind))
    if kind == "plain":
        y = pointwise(official_grn(h, gamma, beta, keep), w2, b2, kind)
        return y if keep is None else y * keep
    if keep is not None:
        h = h.mul_(keep)
    y = pointwise(masked_grn(h, gamma, beta), w2, b2, kind)
    return y if keep is None else y.mul_(keep)


class LayerNorm(nn.Module):
    """:func:`channel_norm` with parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.weight, self.bias)


class GlobalResponseNorm(nn.Module):
    """Holder of GRN's parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))


class Block(nn.Module):
    """ConvNeXt V2 block on NCHW maps; keep [N, H, W, 1] is 1 at visible sites, None for all."""

    def __init__(self, width: int, kind: str = "linear", kernel_size: int = 7) -> None:
        super().__init__()
        self.kind = kind
        self.dwconv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn = GlobalResponseNorm(4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        y = self.dwconv(x)
        if self.kind == "plain" and keep is not None:
            y = y * keep.permute(0, 3, 1, 2)
        first, grn, second = self.pwconv1, self.grn, self.pwconv2
        mlp = (first.weight, first.bias, grn.gamma, grn.beta, second.weight, second.bias)
        y = masked_mlp(self.norm(y), mlp, keep, self.kind)
        return x + y.permute(0, 3, 1, 2)


def patchify(images: Tensor) -> Tensor:
    """Images [N, C, H, W] as patches [N, L, p*p*C], p = 32, pixels row by row, channels fastest."""
    n, c, height, width = images.shape
    p = PATCH
    x = images.reshape(n, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // p) * (width // p), p * p * c)


def keep_map(mask: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Mask [N, Gh, Gw], True = hidden, as [N, Gh*side, Gw*side, 1] of ones at visible sites."""
    keep = (~mask).to(dtype)
    return keep.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]


class MaskedDenseFCMAE(nn.Module):
    """FCMAE computed densely (ConvNeXt V2, section 3), one plain PyTorch call per layer.

    ``forward(images [N, C, H, W], mask [N, Gh, Gw] bool, True = hidden)`` returns the loss and the
    prediction [N, p*p*C, Gh, Gw], p = 32.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        in_chans: int = 3,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 1,
        norm_pix_loss: bool = True,
        baseline: Baseline | None = None,
    ) -> None:
        super().__init__()
        baseline = baseline or Baseline("channels_last", "linear")
        self.memory_format = MEMORY_FORMATS[baseline.layout]
        self.norm_pix_loss = norm_pix_loss
        kind = baseline.pointwise
        self.encoder = nn.Module()
        self.encoder.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), LayerNorm(dims[0]))]
        )
        for narrow, wide in itertools.pairwise(dims):
            self.encoder.downsample_layers.append(nn.Sequential(LayerNorm(narrow), nn.Conv2d(narrow, wide, 2, 2)))
        self.encoder.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, kind) for _ in range(depth)))
            for depth, width in zip(depths, dims, strict=True)
        )
        self.proj = nn.Conv2d(dims[-1], decoder_embed_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_embed_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_embed_dim, kind) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_embed_dim, PATCH**2 * in_chans, 1)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], norm_pix_loss: bool = True, baseline: Baseline | None = None
    ) -> MaskedDenseFCMAE:
        """The network with the sizes, weights (the same memory where the format allows) and dtype of
        an FCMAE state_dict."""
        depths, dims = encoder_sizes(state)
        # Without memory of its own: several variants of a large model are alive at once.
        with torch.device("meta"):
            model = cls(
                depths,
                dims,
                in_chans=state["encoder.downsample_layers.0.0.weight"].shape[1],
                decoder_embed_dim=state["mask_token"].shape[1],
                decoder_depth=len({key.split(".")[1] for key in state if key.startswith("decoder.")}),
                norm_pix_loss=norm_pix_loss,
                baseline=baseline,
            )
        model.load_state_dict(state, assign=True)
        return model.to(memory_format=model.memory_format)

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Encoder output [N, C, Gh, Gw], zero where hidden."""
        x = images.contiguous(memory_format=self.memory_format)
        for down, stage in zip(self.encoder.downsample_layers, self.encoder.stages, strict=True):
            if isinstance(down[0], nn.Conv2d):
                x = down(x).permute(0, 3, 1, 2)
            else:
                x = down[1](down[0](x).permute(0, 3, 1, 2))
            side = x.shape[-1] // mask.shape[-1]
            keep = keep_map(mask, side, x.dtype)
            x = (x * keep.permute(0, 3, 1, 2)).contiguous(memory_format=self.memory_format)
            for block in stage:
                x = block(x, keep)
        return x

    def decode(self, x: Tensor, mask: Tensor) -> Tensor:
        """Prediction [N, p*p*C, Gh, Gw] from encoder features."""
        x = self.proj(x)
        x = torch.where(mask[:, None], self.mask_token.to(x.dtype), x)
        x = x.contiguous(memory_format=self.memory_format)
        return self.pred(self.decoder(x))

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over hidden patches against (per-patch normalised) pixels."""
        target = patchify(images)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) * (variance + EPS).rsqrt()
        error = (pred.flatten(2).transpose(1, 2) - target).square().mean(-1)
        hidden = mask.flatten(1).to(error.dtype)
        return (error * hidden).sum() / hidden.sum()

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pred = self.decode(self.encode(images, mask), mask)
        return self.loss(images, pred, mask), pred


def encoder_sizes(state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Blocks per stage and width of each stage, read from an FCMAE state_dict."""
    depths: list[int] = []
    dims: list[int] = []
    while f"encoder.stages.{len(depths)}.0.dwconv.weight" in state:
        stage = f"encoder.stages.{len(depths)}."
        depths.append(len({key.split(".")[3] for key in state if key.startswith(stage)}))
        dims.append(state[stage + "0.dwconv.weight"].shape[0])
    if not dims:
        raise ValueError("state has no key 'encoder.stages.0.0.dwconv.weight', expected an FCMAE state_dict")
    return depths, dims
