"""Where features are read: inside every block, although a block is one fused operation.

The maps of width 4C never exist in the fused block, so they are computed again from the block's input by the same ops,
one block at a time. What flows from block to block is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layout import PatchLayout
from ..models._checks import check_images, check_layout
from ..models.backbone import Backbone
from ..models.fcmae import FCMAE
from ..nn import ConvNeXtV2Block

TAPS = {
    "act": "after GELU, before GRN, 4C channels",
    "grn": "after GRN, 4C channels",
    "block": "output of the block, C channels",
}


class Tapped(NamedTuple):
    """Features of one layer.

    ``name``: of the block, ``stages.<stage>.<block>``. ``stage``: 0 to 3. ``index``: of the block among all, from 0.
    ``tap``: one of :data:`TAPS`. ``features``: ``[N, H, W, channels]``, or packed ``[P, s, s, channels]``.
    """

    name: str
    stage: int
    index: int
    tap: str
    features: Tensor


def backbone_of(model: nn.Module) -> Backbone:
    """The four stages of a model: an FCMAE's encoder, or the model itself.

    Raises:
        TypeError: neither an FCMAE nor a ConvNeXtV2, ConvNeXtV2Features or SparseEncoder.
    """
    backbone = model.encoder if isinstance(model, FCMAE) else model
    if not isinstance(backbone, Backbone):
        raise TypeError(
            "model must be a ConvNeXtV2, ConvNeXtV2Features, SparseEncoder or FCMAE of this library, got "
            f"{type(model).__name__}"
        )
    return backbone


def block_names(model: nn.Module) -> list[str]:
    """Names of all blocks in order, ``stages.<stage>.<block>``."""
    return [f"stages.{s}.{b}" for s, stage in enumerate(backbone_of(model).stages) for b in range(len(stage))]


def check_taps(taps: Sequence[str], name: str = "taps") -> None:
    """Raise ValueError unless all are of :data:`TAPS`."""
    for tap in taps:
        if tap not in TAPS:
            raise ValueError(f"{name} must be of {', '.join(TAPS)}, got {tap!r}")


@torch.no_grad()
def hidden_features(block: ConvNeXtV2Block, x: Tensor, layout: PatchLayout | None = None) -> tuple[Tensor, Tensor]:
    """The hidden maps of a block before and after GRN, each with 4C channels (ConvNeXt V2 paper, Figure 5).

    ``x [P, s, s, C]`` packed, or dense ``[N, H, W, C]`` without a layout, is the block's input. GRN is the block's own,
    so an ablated block gives what it computes.
    """
    conv, norm, linear = block.dwconv, block.norm, block.pwconv1
    y = ops.depthwise_conv_layer_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, layout, eps=norm.eps)
    act = F.gelu(ops.linear(y, linear.weight, linear.bias))
    return act, block.grn(act, layout)


@torch.no_grad()
def tapped(
    model: nn.Module, images: Tensor, layout: PatchLayout | None = None, taps: Sequence[str] = ("grn",)
) -> Iterator[Tapped]:
    """Features of ``model`` in evaluation mode, one block after the other, without gradients.

    Memory is that of one block: whoever keeps what is yielded pays for it.

    Args:
        model: ConvNeXtV2, ConvNeXtV2Features, SparseEncoder or FCMAE (its encoder).
        images: ``[N, in_chans, H, W]``; without a layout of any sides of at least 32.
        layout: the visible patches, or None for whole images.
        taps: of :data:`TAPS`; yielded in the order act, grn, block.

    Raises:
        TypeError, ValueError: a model of another kind, an unknown tap, or images and layout that do not fit.
    """
    backbone = backbone_of(model)
    check_taps(taps)
    check_images(images, backbone.in_chans, 32, any_size=layout is None)
    if layout is not None:
        check_layout(layout, images)
    x = images if backbone.feature_dtype is None else images.to(backbone.feature_dtype)
    training = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        index = 0
        for stage, (downsample, blocks) in enumerate(zip(backbone.downsample_layers, backbone.stages, strict=True)):
            x = downsample(x, layout)
            for number, block in enumerate(blocks):
                name = f"stages.{stage}.{number}"
                if "act" in taps or "grn" in taps:
                    hidden = dict(zip(("act", "grn"), hidden_features(block, x, layout), strict=True))
                    for tap in [tap for tap in hidden if tap in taps]:
                        yield Tapped(name, stage, index, tap, hidden.pop(tap))
                    del hidden
                x = block(x, layout)
                if "block" in taps:
                    yield Tapped(name, stage, index, "block", x)
                index += 1
    finally:
        for module, was in training.items():
            module.training = was
