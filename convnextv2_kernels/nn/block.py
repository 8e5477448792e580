"""The ConvNeXt V2 block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import PatchLayout
from ._checks import check_drop_path, check_positive
from .init import init_linear_map
from .layers import GlobalResponseNorm, LayerNorm, SubmanifoldDepthwiseConv2d


class ConvNeXtV2Block(nn.Module):
    """``x + W2 GRN(GELU(W1 LN(conv7x7(x)) + b1)) + b2`` (ConvNeXt V2 paper, Figure 5), one autograd
    node.

    The children carry the official names and hold parameters only; the block computes from all of
    them at once.

    Args:
        dim: C; the hidden width is 4C.
        drop_path: probability with which, in training, an image skips the block's branch; the
            branch of the images that keep it is divided by ``1 - drop_path``.
        scope: see :class:`GlobalResponseNorm`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, scope: str = "image"):
        super().__init__()
        check_positive("dim", dim)
        self.drop_path = check_drop_path(drop_path)
        self.dwconv = SubmanifoldDepthwiseConv2d(dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GlobalResponseNorm(4 * dim, scope=scope)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        init_linear_map(self.pwconv1)
        init_linear_map(self.pwconv2)

    def forward(self, x: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """``x [P, s, s, C]`` packed, or dense ``[N, H, W, C]`` without a layout -> the same shape
        and dtype."""
        return ops.convnextv2_block(
            x,
            self.dwconv.weight,
            self.dwconv.bias,
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            self.grn.gamma,
            self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
            layout=layout,
            drop_path_scale=self._draw_drop_path_scale(x, layout),
            scope=self.grn.scope,
            eps=self.norm.eps,
            grn_eps=self.grn.eps,
        )

    def _draw_drop_path_scale(self, x: Tensor, layout: PatchLayout | None) -> Tensor | None:
        """``[N]`` of 0 or ``1 / keep``, one draw per image (Huang et al. 2016), or ``None`` where
        all keep."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        images = x.shape[0] if layout is None else layout.num_images
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty(images, device=x.device, dtype=dtype).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}" if self.drop_path else ""
