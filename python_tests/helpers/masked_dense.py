"""FCMAE as masked dense layers in plain PyTorch: the oracle of the model tests.

NCHW throughout, and nothing of the package is used. After the stem, after each downsampling, and
after each convolution and block, the maps are multiplied by the mask. The state_dict names are
those of the package.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

STRIDE = 32


class ChannelNorm(nn.Module):
    """LayerNorm over dimension 1."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        rows = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return rows.permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation of ``[N, H, W, C]`` with the norm over the kept sites."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x, keep, scope):
        sites = (0, 1, 2) if scope == "batch" else (1, 2)
        norm = torch.linalg.vector_norm(x * keep, dim=sites, keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x, keep, scope="image"):
        y = (self.dwconv(x) * keep).permute(0, 2, 3, 1)
        y = F.gelu(self.pwconv1(self.norm(y)))
        y = self.pwconv2(self.grn(y, keep.permute(0, 2, 3, 1), scope))
        return (x + y.permute(0, 3, 1, 2)) * keep


class Encoder(nn.Module):
    def __init__(self, in_chans, depths, dims):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), ChannelNorm(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in itertools.pairwise(dims):
            conv = nn.Conv2d(narrow, wide, 2, stride=2)
            self.downsample_layers.append(nn.Sequential(ChannelNorm(narrow), conv))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim) for _ in range(depth)) for depth, dim in zip(depths, dims, strict=True)
        )

    def forward(self, images, hidden, scope="image"):
        """``hidden [N, Gh, Gw]`` bool -> ``[N, C, H/32, W/32]``."""
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            keep = keep_map(hidden, x)
            x = x * keep
            for block in stage:
                x = block(x, keep, scope)
        return x


class MaskedDenseFCMAE(nn.Module):
    def __init__(self, depths, dims, in_chans=3, patch_size=32, decoder_dim=512, decoder_depth=1):
        super().__init__()
        self.in_chans, self.patch_size = in_chans, patch_size
        self.encoder = Encoder(in_chans, depths, dims)
        self.proj = nn.Conv2d(dims[-1], decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = nn.ModuleList(Block(decoder_dim) for _ in range(decoder_depth))
        self.pred = nn.Conv2d(decoder_dim, STRIDE * STRIDE * in_chans, 1)

    def forward(self, images, hidden, scope="image", norm_pix_loss=True):
        """``hidden [N, Gh, Gw]`` bool -> ``(loss, pred [N, p*p*in_chans, Gh, Gw])``."""
        x = self.proj(self.encoder(images, hidden, scope))
        keep = keep_map(hidden, x)
        x = x * keep + self.mask_token * (1 - keep)
        for block in self.decoder:
            x = block(x, torch.ones_like(keep))
        n, _, h, w = x.shape
        # Paint the predicted image, then cut it into patches, whatever their size.
        pixels = self.pred(x).reshape(n, STRIDE, STRIDE, self.in_chans, h, w)
        picture = torch.einsum("npqchw->nchpwq", pixels)
        picture = picture.reshape(n, self.in_chans, h * STRIDE, w * STRIDE)
        pred, target = patch_rows(picture, self.patch_size), patch_rows(images, self.patch_size)
        if norm_pix_loss:
            target = target - target.mean(dim=-1, keepdim=True)
            target = target / (target.var(dim=-1, unbiased=True, keepdim=True) + 1e-6) ** 0.5
        weight = hidden.flatten(1).to(pred.dtype)
        loss = (((pred - target) ** 2).mean(dim=-1) * weight).sum() / weight.sum()
        return loss, pred.transpose(1, 2).unflatten(2, hidden.shape[1:])


def keep_map(hidden, x):
    """``[N, Gh, Gw]`` bool -> 0/1 map ``[N, 1, H, W]`` of the size of x."""
    scale = x.shape[2] // hidden.shape[1]
    keep = (~hidden).to(x.dtype).unsqueeze(1)
    return keep.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)


def patch_rows(images, p):
    """``[N, C, H, W]`` -> ``[N, L, p*p*C]``, colour fastest."""
    n, c, h, w = images.shape
    x = images.reshape(n, c, h // p, p, w // p, p)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(n, (h // p) * (w // p), p * p * c)
