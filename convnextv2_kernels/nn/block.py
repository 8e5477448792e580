"""The block of ConvNeXt V2, and of V1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import PatchLayout
from ..ops._checks import check_drop_path_rate, check_layer_scale, check_positive
from ..ops._grn_variant import GRNVariant
from ..ops.block import BlockParameters, block_around
from .hidden_layers import HiddenLayer, hidden_layer
from .init import init_linear_map
from .layers import GlobalResponseNorm, LayerNorm, SubmanifoldDepthwiseConv2d


class ConvNeXtV2Block(nn.Module):
    """``x + W2 GRN(GELU(W1 LN(conv7x7(x)) + b1)) + b2`` (ConvNeXt V2 paper, Figure 5), one autograd
    node.

    The children have the official names and only hold parameters; the block computes with all of
    them at once.

    With ``grn="none"`` and a ``layer_scale`` it is the block of ConvNeXt V1, ``x + gamma * (W2 GELU(...) + b2)``, and
    its state_dict has the official names of V1: ``gamma``, and nothing of GRN.

    Args:
        dim: C; the hidden width is 4C.
        drop_path: probability with which, in training, an image skips the block's branch; the
            branch of the other images is divided by ``1 - drop_path``.
        scope: see :class:`GlobalResponseNorm`.
        grn: an ablation of GRN, see :class:`.GRNVariant`, or its text, or another layer in its place. With one that is
            neither "default" nor "none" the block is computed in plain PyTorch, and differentiated by it. "none" alone
            leaves layer scale out too; its state_dict then has GRN's parameters, which are zero.
        layer_scale: initial value of ``gamma [C]``, which multiplies the branch before drop path (1e-6 in V1), or None
            for no layer scale, as in V2.

    Attributes:
        given_drop_path: ``[N]`` factors of 0 or ``1 / (1 - drop_path)``, one per image, used instead of random ones
            while drop path is active; ``None`` to draw them. Not part of the state_dict, nor moved with the parameters.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        scope: str = "image",
        grn: str | GRNVariant = "default",
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.given_drop_path: Tensor | None = None
        check_positive("dim", dim)
        self.drop_path = check_drop_path_rate(drop_path)
        self.dwconv = SubmanifoldDepthwiseConv2d(dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        scale = check_layer_scale(layer_scale)
        variant = GRNVariant.of(grn)
        self.grn = hidden_layer(4 * dim, scope, variant, affine=variant.enabled or scale is None)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        init_linear_map(self.pwconv1)
        init_linear_map(self.pwconv2)
        self.gamma = None if scale is None else nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, layout: PatchLayout | None = None, visible: Tensor | None = None) -> Tensor:
        """``x [P, s, s, C]`` packed, or dense ``[N, H, W, C]`` without a layout -> the same shape and dtype.

        ``visible [N, H, W, 1]``: 1 at visible and 0 at hidden sites of a dense map that is zero at hidden sites; the
        result is zero there too, and computed in plain PyTorch.

        Raises:
            RuntimeError: a GRN variant or a mask that only the reference has, and another backend is forced.
            ValueError: ``given_drop_path`` of another length than the number of images.
        """
        grn = self.grn
        if isinstance(grn, HiddenLayer):
            return self._around(grn, x, layout, visible)
        return ops.convnextv2_block(
            x,
            *self._parameters_in_order(grn),
            layout=layout,
            drop_path_scale=self._drop_path_scale(x, layout),
            scope=grn.scope,
            eps=self.norm.eps,
            grn_eps=grn.eps,
            grn=grn.variant,
            visible=visible,
            layer_scale=self.gamma,
        )

    def _around(self, layer: HiddenLayer, x: Tensor, layout: PatchLayout | None, visible: Tensor | None) -> Tensor:
        conv, norm, first, second = self.dwconv, self.norm, self.pwconv1, self.pwconv2
        linear = (first.weight, first.bias, second.weight, second.bias)
        return block_around(
            lambda hidden: layer(hidden, layout, visible),
            x,
            (conv.weight, conv.bias, norm.weight, norm.bias, *linear),
            layout,
            self._drop_path_scale(x, layout),
            norm.eps,
            visible,
            self.gamma,
        )

    def _parameters_in_order(self, grn: GlobalResponseNorm) -> BlockParameters:
        """As the block op takes them."""
        conv, norm, first, second = self.dwconv, self.norm, self.pwconv1, self.pwconv2
        linear = (first.weight, first.bias, grn.gamma, grn.beta, second.weight, second.bias)
        return conv.weight, conv.bias, norm.weight, norm.bias, *linear

    def _drop_path_scale(self, x: Tensor, layout: PatchLayout | None) -> Tensor | None:
        """``[N]`` of 0 or ``1 / (1 - drop_path)``, one draw per image (Huang et al. 2016), or ``None`` where no image
        is dropped."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep_prob = 1.0 - self.drop_path
        images = x.shape[0] if layout is None else layout.num_images
        given = self.given_drop_path
        if given is not None:
            if tuple(given.shape) != (images,):
                raise ValueError(
                    f"given_drop_path has shape {list(given.shape)}, expected [{images}], one factor per image"
                )
            return given
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty(images, device=x.device, dtype=dtype).bernoulli_(keep_prob).div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}" if self.drop_path else ""
