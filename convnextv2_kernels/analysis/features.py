"""Features of a network: inside every block, although a block is one fused operation, and of a whole labelled dataset.

The maps of width 4C never exist in the fused block, so they are computed again from the block's input by the same ops,
one block at a time. What flows from block to block is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..data.labelled import NO_LABEL, EvalDataset, LabelledBatch, collate_labelled
from ..layout import PatchLayout
from ..models.backbone import Backbone
from ..models.fcmae import FCMAE
from ..nn import ConvNeXtV2Block
from ..ops._checks import check_images, check_layout_of_images
from ..train.loading import Loader, Loading

TAPS = {
    "act": "after GELU, before GRN, 4C channels",
    "grn": "after GRN, 4C channels",
    "block": "output of the block, C channels",
}
POOLS = ("mean", "norm")


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


class OtherNetwork(nn.Module):
    """A network of another library, which is read in its own way."""

    def block_names(self) -> list[str]:
        """Names of its blocks, in order."""
        raise NotImplementedError

    def tapped(self, images: Tensor, taps: Sequence[str]) -> Iterator[Tapped]:
        """As :func:`tapped`, of whole images that are normalised with ImageNet's mean and deviation."""
        raise NotImplementedError


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
    """Names of all blocks in order, ``stages.<stage>.<block>`` or those of another library."""
    if isinstance(model, OtherNetwork):
        return model.block_names()
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
        model: ConvNeXtV2, ConvNeXtV2Features, SparseEncoder or FCMAE (its encoder), or a network of timm
            (:class:`.timm_networks.TimmNetwork`), all of whose layers exist at once.
        images: ``[N, in_chans, H, W]``; without a layout of any sides of at least 32.
        layout: the visible patches, or None for whole images.
        taps: of :data:`TAPS`; yielded in the order act, grn, block.

    Raises:
        TypeError, ValueError: a model of another kind, an unknown tap, or images and layout that do not fit.
    """
    if isinstance(model, OtherNetwork):
        check_taps(taps)
        if layout is not None:
            raise ValueError("layout must be None for a network of another library, which takes whole images")
        yield from model.tapped(images, taps)
        return
    backbone = backbone_of(model)
    check_taps(taps)
    check_images(images, backbone.in_chans, 32, any_size=layout is None)
    if layout is not None:
        check_layout_of_images(layout, images)
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


@torch.no_grad()
def extract_features(
    model: Backbone,
    data: Iterable[LabelledBatch],
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
    pool: str = "mean",
    amp_dtype: torch.dtype | None = None,
    failures: list[tuple[str, str]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (features float32 ``[N, D]``, labels int64 ``[N]``) on the CPU, in the data's order.

    Args:
        model: a ConvNeXtV2 or ConvNeXtV2Features, moved to ``device`` and evaluated; its head is not used, its
            training mode is put back.
        data: batches such as :func:`labelled_loader` makes.
        advance: called with how many images are done.
        pool: "mean" averages the last stage over its sites; "norm" normalises that by the classifier's ``norm``,
            which pre-training does not train.
        amp_dtype: dtype of autocast; None for float32.
        failures: takes (name, reason) of images that could not be read. They are left out: N is smaller by them.

    Raises:
        ValueError: ``pool`` is neither, or no image could be read.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be 'mean' or 'norm', got {pool!r}")
    was_training = model.training
    model.to(device).eval()
    found, labels, done = [], [], 0
    try:
        for batch in data:
            if failures is not None:
                failures.extend(batch.failures)
            done += len(batch.labels)
            readable = batch.labels != NO_LABEL
            if batch.images is not None and readable.any():
                images = batch.images[readable].to(device, non_blocking=True)
                with torch.autocast(torch.device(device).type, dtype=amp_dtype, enabled=amp_dtype is not None):
                    pooled = model.forward_features(images) if pool == "norm" else model.run_stages(images).mean((1, 2))
                found.append(pooled.float().cpu())
                labels.append(batch.labels[readable])
            if advance is not None:
                advance(done)
    finally:
        model.train(was_training)
    if not found:
        raise ValueError(f"data must hold a readable image, got none in {done}")
    return torch.cat(found), torch.cat(labels)


def labelled_loader(
    dataset: EvalDataset, batch_size: int = 64, loading: Loading | None = None, device: torch.device | None = None
) -> Loader:
    """Batches of a dataset for ``device``, in its order. Iterating over them raises
    :class:`.train.loading.LoaderError` where loaders die or stay silent."""
    return Loader(dataset, collate_labelled, loading or Loading(), device, batch_size=batch_size)
