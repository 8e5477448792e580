"""The layers that the paper's Table 2d and e put in the place of GRN, between GELU and the second linear map.

They are the field's own layers with their usual settings (the paper gives none), run in plain PyTorch on packed visible
rows or on dense maps:

* ``lrn``: :class:`torch.nn.LocalResponseNorm` over 5 neighbouring channels of a site (AlexNet's size, PyTorch's alpha
  1e-4, beta 0.75 and k 1), without parameters. Its numbers are recorded in a buffer ``constants``.
* ``bn``: :class:`torch.nn.BatchNorm1d` over the visible rows of the batch, as a process computes them together.
* ``ln``: :class:`torch.nn.LayerNorm` over the channels of a site.
* ``se``: timm's squeeze-and-excitation with reduction 1/16, which pools over an image's visible sites.
* ``cbam``: timm's convolutional block attention with reduction 1/16. Its pools are over an image's visible sites; its
  7x7 convolution is over the map, where hidden sites are zero; the batch norm behind it is over visible sites.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import PatchLayout
from ..ops import _pooling
from ..ops._checks import check_packed, check_positive, check_scope
from ..ops._dispatch import no_autocast, require_reference
from ..ops._grn_variant import GRNVariant
from ..tracing import for_any_input
from .init import init_linear_map
from .layers import GlobalResponseNorm

LRN_SIZE = 5
REDUCTION = 1 / 16
_COUNT_ROWS = ("lrn", "bn", "cbam")  # PyTorch's functions of these ask whether there are any rows


def hidden_layer(
    dim: int, scope: str = "image", grn: str | GRNVariant = "default", affine: bool = True
) -> GlobalResponseNorm | HiddenLayer:
    """The layer between GELU and the second linear map of a block with ``dim`` hidden channels: GRN by any formula, or
    one of this module's. ``affine``: of :class:`.GlobalResponseNorm`.

    Raises:
        ValueError: an argument out of range.
        ImportError: a layer of timm, and timm cannot be imported.
    """
    variant = GRNVariant.of(grn)
    if variant.layer == "grn":
        return GlobalResponseNorm(dim, scope=scope, variant=variant, affine=affine)
    return _LAYERS[variant.layer](dim, scope, variant)


class HiddenLayer(nn.Module):
    """A layer in the place of GRN; the field's own is its child ``layer``.

    ``variant`` names it, as in :class:`.GlobalResponseNorm`. ``scope`` is kept for those that read it of GRN: none of
    these layers has a norm over the batch or an image to choose.
    """

    def __init__(self, dim: int, scope: str, variant: GRNVariant):
        super().__init__()
        self.dim = check_positive("dim", dim)
        self.scope = check_scope(scope)
        self.variant = variant
        self.layer = self._build(dim)
        for module in self.layer.modules():
            if isinstance(module, nn.Conv2d):
                init_linear_map(module)

    def forward(self, x: Tensor, layout: PatchLayout | None = None, visible: Tensor | None = None) -> Tensor:
        """``x [P, s, s, C]`` packed, or dense ``[N, H, W, C]`` without a layout -> the same shape and dtype.

        ``visible [N, H, W, 1]``: 1 at visible and 0 at hidden sites of a dense map that is zero at hidden sites; what
        the result holds there means nothing. Computed in the dtype of the parameters.

        Raises:
            RuntimeError: another backend than the reference is forced.
            ValueError: an export for any mask of a layer that cannot be exported so; a batch norm trains on one site.
        """
        require_reference(f"the layer {str(self.variant)!r} in the place of GRN")
        check_packed(x, layout)
        if layout is not None and isinstance(x.shape[0], torch.SymInt) and self.variant.layer in _COUNT_ROWS:
            raise ValueError(
                f"grn {str(self.variant)!r} needs the number of visible rows, which an exported program for any mask "
                "leaves open: export it on whole maps, or with torch.jit.trace"
            )
        if not for_any_input() and x.numel() == 0:
            return x
        dtype = next((t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), x.dtype)
        with no_autocast(x):
            return self._compute(x.to(dtype), layout, visible).to(x.dtype)

    def _build(self, dim: int) -> nn.Module:
        raise NotImplementedError

    def _compute(self, x: Tensor, layout: PatchLayout | None, visible: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _several(self, batch_norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``batch_norm`` of rows ``[R, C]``, of which one has no variance."""

        def normalize(rows: Tensor) -> Tensor:
            if self.training and not for_any_input() and rows.shape[0] == 1:
                raise ValueError(
                    f"grn {str(self.variant)!r} trains on a batch of at least 2 visible sites at every stage, got 1: a "
                    "batch norm has no variance of one"
                )
            return batch_norm(rows)

        return normalize

    def extra_repr(self) -> str:
        return f"{self.dim}, variant='{self.variant}'"


class _LocalResponseNorm(HiddenLayer):
    def _build(self, dim: int) -> nn.Module:
        layer = nn.LocalResponseNorm(LRN_SIZE)
        # a file tells by it that it is of this layer, which has no parameters
        layer.register_buffer("constants", torch.tensor([layer.size, layer.alpha, layer.beta, layer.k]))
        return layer

    def _compute(self, x: Tensor, layout: PatchLayout | None, visible: Tensor | None) -> Tensor:
        return self.layer(x.reshape(-1, x.shape[-1], 1)).view(x.shape)


class _LayerNorm(HiddenLayer):
    def _build(self, dim: int) -> nn.Module:
        return nn.LayerNorm(dim, eps=1e-6)

    def _compute(self, x: Tensor, layout: PatchLayout | None, visible: Tensor | None) -> Tensor:
        return self.layer(x)


class _BatchNorm(HiddenLayer):
    def _build(self, dim: int) -> nn.Module:
        return nn.BatchNorm1d(dim)

    def _compute(self, x: Tensor, layout: PatchLayout | None, visible: Tensor | None) -> Tensor:
        return _on_visible_rows(self._several(self.layer), x, visible)


class _SqueezeExcite(HiddenLayer):
    layer: Any

    def _build(self, dim: int) -> nn.Module:
        return _timm_layers(self.variant).SEModule(dim, rd_ratio=REDUCTION)

    def _compute(self, x: Tensor, layout: PatchLayout | None, visible: Tensor | None) -> Tensor:
        se = self.layer
        pooled = _pooling.image_means(x, layout, visible)[..., None, None]
        scale = se.gate(se.fc2(se.act(se.bn(se.fc1(pooled))))).flatten(1)
        return x * _pooling.spread_over_rows(scale, x, layout)


class _BlockAttention(HiddenLayer):
    layer: Any

    def _build(self, dim: int) -> nn.Module:
        return _timm_layers(self.variant).cbam.CbamModule(dim, rd_ratio=REDUCTION)

    def _compute(self, x: Tensor, layout: PatchLayout | None, visible: Tensor | None) -> Tensor:
        channel, spatial = self.layer.channel, self.layer.spatial
        pools = (_pooling.image_means(x, layout, visible), _pooling.image_maxima(x, layout, visible))
        mean, largest = (channel.fc2(channel.act(channel.fc1(pooled[..., None, None]))) for pooled in pools)
        x = x * _pooling.spread_over_rows(channel.gate(mean + largest).flatten(1), x, layout)
        maps = torch.cat((x.mean(-1, keepdim=True), x.amax(-1, keepdim=True)), dim=-1)
        if visible is not None:
            maps = maps * visible.to(maps.dtype)
        dense = maps if layout is None else _pooling.scatter_patches(maps, layout, None)
        attention = spatial.conv.conv(dense.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if layout is not None:
            attention = _pooling.gather_patches(attention, layout)
        norm = spatial.conv.bn
        normalize = self._several(lambda rows: norm(rows[..., None, None]).flatten(1))
        return x * spatial.gate(_on_visible_rows(normalize, attention, visible))


_LAYERS: dict[str, type[HiddenLayer]] = {
    "lrn": _LocalResponseNorm,
    "bn": _BatchNorm,
    "ln": _LayerNorm,
    "se": _SqueezeExcite,
    "cbam": _BlockAttention,
}


def _on_visible_rows(function: Any, x: Tensor, visible: Tensor | None) -> Tensor:
    """``function`` of the rows ``[R, C]`` of the visible sites, put back into the shape of x; x where hidden."""
    if visible is None:
        return function(x.reshape(-1, x.shape[-1])).view(x.shape)
    seen = (visible > 0).squeeze(-1)
    if not bool(seen.any()):
        return x
    return x.masked_scatter(seen[..., None].expand_as(x), function(x[seen]))


def _timm_layers(variant: GRNVariant) -> ModuleType:
    """``timm.layers``, which the rest of the library does without."""
    try:
        import timm.layers
        import timm.layers.cbam
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is of another build of PyTorch
        raise ImportError(
            f"grn needs timm for {str(variant)!r}, and timm cannot be imported ({error}); install it with "
            "pip install timm"
        ) from error
    return timm.layers
