"""The fully convolutional masked autoencoder (ConvNeXt V2 paper, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import PatchLayout, mask_fault, random_kept
from ..nn import ConvNeXtV2Block, GRNVariant
from ..nn.init import init_linear_map
from ..ops._checks import as_bool_mask, as_layout, check_images, check_positive
from ..sizes import CONFIGS
from ..tracing import exporting
from . import patchify
from .backbone import SparseEncoder
from .decoders import DECODERS, build_decoder
from .loss import reconstruction_loss
from .masked_dense import dense_stages, masked_dense_stages

_STRIDE = 32
ENCODINGS = ("sparse", "masked_dense", "dense")
_TINY = CONFIGS["convnextv2_tiny"]


class FCMAE(nn.Module):
    """Sparse encoder on the visible patches, dense decoder of one block, loss on the hidden patches.

    state_dict keys are the official ones, with the encoder's in the dense spelling. Weights are
    drawn from N(0, 0.02^2), biases and GRN are 0. The official code accidentally re-draws most
    weights with standard deviation 1, so that training starts at a loss of 16 instead of 1; this is
    not reproduced.

    Args:
        depths, dims: blocks and width of each of the four encoder stages.
        img_size: side, or (height, width), of the images; only a default, see :meth:`forward`.
        in_chans: channels of the images.
        patch_size: side of a mask patch in pixels, any multiple of 32.
        mask_ratio: share of hidden patches if no mask is given; :meth:`forward` then refuses images of which it would
            hide all patches or none.
        decoder_depth, decoder_embed_dim: blocks and width of the decoder.
        norm_pix_loss: predict each patch normalised by its own mean and deviation.
        grn_scope: GRN of the encoder, ``"image"`` (paper) or ``"batch"`` (official sparse code). In
            the decoder, which works on dense maps, it is per image in both.
        feature_dtype: dtype of the feature maps, see :class:`.backbone.Backbone`.
        grn: GRN of every block of encoder and decoder, a :class:`~convnextv2_kernels.nn.GRNVariant` or its text.
        encoding: ``"sparse"``; ``"masked_dense"``: the same numbers on whole maps; or ``"dense"``: convolutions over
            images that are masked once, which leak into hidden sites; both by :mod:`.masked_dense`.
        decoder: ``"convnext"``, blocks at stride 32; or ``"unet"``, ``"unet-no-skip"``, ``"transformer"`` (Table 1a),
            see :mod:`.decoders`.
        layer_scale: initial layer scale of every block of the encoder, or None for none, as in V2. A decoder of
            ConvNeXt blocks follows the encoder: with ``grn="none"`` and 1e-6 both have blocks of ConvNeXt V1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        depths: Sequence[int] = _TINY.depths,
        dims: Sequence[int] = _TINY.dims,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 32,
        mask_ratio: float = 0.6,
        decoder_depth: int = 1,
        decoder_embed_dim: int = 512,
        norm_pix_loss: bool = True,
        grn_scope: str = "image",
        feature_dtype: torch.dtype | None = None,
        grn: str | GRNVariant = "default",
        encoding: str = "sparse",
        decoder: str = "convnext",
        layer_scale: float | None = None,
    ):
        super().__init__()
        if check_positive("patch_size", patch_size) % _STRIDE:
            raise ValueError(f"patch_size must be a multiple of {_STRIDE}, got {patch_size}")
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) != 2 or any(side < 1 or side % patch_size for side in size):
            raise ValueError(
                f"img_size must be one or two positive multiples of patch_size {patch_size}, got {img_size!r}"
            )
        self.img_size = size
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        if not 0.0 <= mask_ratio <= 1.0:
            raise ValueError(f"mask_ratio must lie in [0, 1], got {mask_ratio!r}")
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        self.encoding = encoding
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        self.decoder_kind = decoder
        self.grn = GRNVariant.of(grn)

        self.encoder = SparseEncoder(
            in_chans,
            depths,
            dims,
            grn_scope=grn_scope,
            feature_dtype=feature_dtype,
            grn=self.grn,
            layer_scale=layer_scale,
        )
        dim = check_positive("decoder_embed_dim", decoder_embed_dim)
        self.proj = nn.Conv2d(dims[-1], dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.empty(1, dim, 1, 1))
        depth = check_positive("decoder_depth", decoder_depth)
        self.decoder: nn.Module
        self._pixels, width = _STRIDE, dim  # side of the square that a decoded site predicts, and its channels
        if decoder == "convnext":
            blocks = (ConvNeXtV2Block(dim, grn=self.grn, layer_scale=layer_scale) for _ in range(depth))
            self.decoder = nn.ModuleList(blocks)
        else:
            self.decoder = other = build_decoder(decoder, dim, depth, dims, self.grn)
            self._pixels, width = other.stride, other.out_dim
        self.pred = nn.Conv2d(width, self._pixels * self._pixels * in_chans, kernel_size=1)
        init_linear_map(self.proj)
        init_linear_map(self.pred)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor | PatchLayout | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct the hidden patches.

        Args:
            images: ``[N, in_chans, H, W]``, H and W any multiples of ``patch_size``.
            mask: ``[N, Gh, Gw]`` or ``[N, Gh*Gw]``, bool or 0/1, 1 = hidden, any number per image;
                or a ready :class:`~convnextv2_kernels.PatchLayout` of the visible patches. By
                default ``int(L * (1 - mask_ratio))`` random patches of each image are visible.

        Returns:
            ``(loss, pred, mask)``. ``loss``: mean squared error over the pixels of a patch, then
            over the hidden patches of the batch. A given mask may hide all of an image, or of every
            image: the loss is still that mean, but the encoder learns nothing from such an image. If
            nothing at all is hidden, loss and gradients are 0. ``pred [N, patch_size^2 *
            in_chans, Gh, Gw]``: channel ``(p * patch_size + q) * in_chans + c`` is channel c of
            pixel (p, q) of a patch. ``mask [N, L]``: float32, 1 = hidden.

        Raises:
            TypeError, ValueError: images or mask of another shape, dtype or device; no mask, and ``mask_ratio`` hides
                all or none of the patches of images of this size.
            RuntimeError: an encoding or a GRN variant that only the reference has, and another backend is forced.
        """
        visible = self._layout(images, mask)
        hidden = visible.complement()
        decoded = self._decode(*self._encode_stages(images, visible), visible)
        # Two GEMMs instead of one keep the gradient of the loss out of the visible patches.
        hidden_pred = self._predict(decoded, hidden)
        visible_pred = self._predict(decoded, visible)
        loss = reconstruction_loss(hidden_pred, self._target(images, hidden))
        pred = _assemble(visible_pred, visible, hidden_pred, hidden)
        return loss, pred, visible.hidden_mask().flatten(1).to(torch.float32)

    def encode(self, images: Tensor, mask: Tensor | PatchLayout) -> tuple[Tensor, PatchLayout]:
        """Features ``[P, patch_size/32, patch_size/32, dims[3]]`` of the visible patches, and their
        layout."""
        layout = self._layout(images, mask)
        features, _ = self._encode_stages(images, layout)
        return features, layout

    def encode_dense(self, images: Tensor, mask: Tensor | PatchLayout) -> Tensor:
        """Features as a map ``[N, dims[3], H/32, W/32]``, zero where hidden."""
        features, layout = self.encode(images, mask)
        return ops.scatter_patches(features, layout).permute(0, 3, 1, 2)

    def patchify(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, L, patch_size^2 * C]``, see :func:`.patchify.patchify`."""
        return patchify.patchify(images, self.patch_size)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Inverse of :meth:`patchify`; ``grid`` is ``img_size``'s if not given."""
        return patchify.unpatchify(patches, self.patch_size, self.grid if grid is None else grid)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, pred: Tensor, mask: Tensor | PatchLayout) -> Tensor:
        """``images [N, in_chans, H, W]`` with the hidden patches replaced by predictions.

        If the model predicts normalised patches, the mean and deviation of the true patch are
        restored.

        Args:
            images: as given to :meth:`forward`.
            pred, mask: as returned by it; or the mask given to it.
        """
        check_images(images, self.in_chans, self.patch_size)
        n, grid = images.shape[0], self._grid_of(images)
        expected = [n, self.patch_size**2 * self.in_chans, *grid]
        if list(pred.shape) != expected:
            raise ValueError(f"pred must have shape {expected}, got {list(pred.shape)}")
        if isinstance(mask, PatchLayout):
            mask = as_layout(mask, n, grid, images.device).hidden_mask()
        hidden = as_bool_mask(mask, n, grid, images.device).flatten(1)
        patches = self.patchify(images)
        predicted = pred.flatten(2).transpose(1, 2).to(patches.dtype)
        if self.norm_pix_loss:
            mean, deviation = patchify.pixel_statistics(patches)
            predicted = predicted * deviation + mean
        return self.unpatchify(torch.where(hidden[..., None], predicted, patches), grid)

    def extra_repr(self) -> str:
        decoder = "" if self.decoder_kind == "convnext" else f", decoder={self.decoder_kind!r}"
        return (
            f"img_size={self.img_size}, patch_size={self.patch_size}, "
            f"mask_ratio={self.mask_ratio}, norm_pix_loss={self.norm_pix_loss}, grn='{self.grn}', "
            f"encoding={self.encoding!r}{decoder}"
        )

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    def _layout(self, images: Tensor, mask: Tensor | PatchLayout | None) -> PatchLayout:
        check_images(images, self.in_chans, self.patch_size)
        n, grid = images.shape[0], self._grid_of(images)
        if mask is not None:
            return as_layout(mask, n, grid, images.device)
        if exporting():
            raise ValueError("mask must be given in an export to ONNX or TorchScript, which draws none, got None")
        if (fault := mask_fault(grid, self.mask_ratio, self.patch_size, size_name="images")) is not None:
            raise ValueError(f"{fault}, or give a mask")
        kept = random_kept(n, grid, self.mask_ratio, device=images.device)
        return PatchLayout.from_kept(kept, grid)

    def _encode_stages(self, images: Tensor, visible: PatchLayout) -> tuple[Tensor, Sequence[Tensor]]:
        """Packed features of the visible patches, in the encoding of the model; and those of the three stages before,
        where the decoder joins them."""
        if self.encoding == "sparse" and self.decoder_kind != "unet":
            return self.encoder(images, visible), ()
        if self.encoding == "sparse":
            *before, last = self.encoder.stage_outputs(images, visible)
            return last, before
        stages = masked_dense_stages if self.encoding == "masked_dense" else dense_stages
        *before, last = stages(self.encoder, images, visible)
        skips = [ops.gather_patches(x, visible) for x in before] if self.decoder_kind == "unet" else []
        return ops.gather_patches(last, visible), skips

    def _decode(self, features: Tensor, skips: Sequence[Tensor], visible: PatchLayout) -> Tensor:
        """Packed features -> decoded map ``[N, H/stride, W/stride, width]``, of stride 32 but for a UNet.

        Hidden sites hold the mask token, so projecting the visible rows alone is exact.
        """
        rows = ops.linear(features, self.proj.weight.flatten(1), self.proj.bias)
        x = ops.scatter_patches(rows, visible, fill=self.mask_token)
        if self.decoder_kind != "convnext":
            return self.decoder(x, skips, visible)
        for block in cast("nn.ModuleList", self.decoder):
            x = block(x)
        return x

    def _predict(self, decoded: Tensor, layout: PatchLayout) -> Tensor:
        """Predicted pixels ``[P, patch_size^2 * in_chans]`` of the patches of a layout.

        Every site of stride 32 predicts its own 32x32 pixels (with a UNet, of stride 4 its own 4x4), which larger
        patches put in row-major order.
        """
        rows = ops.gather_patches(decoded, layout)
        p, m = rows.shape[:2]
        out = ops.linear(rows, self.pred.weight.flatten(1), self.pred.bias)
        out = out.view(p, m, m, self._pixels, self._pixels, self.in_chans).transpose(2, 3)
        return out.reshape(p, self.patch_size**2 * self.in_chans)

    @torch.no_grad()
    def _target(self, images: Tensor, hidden: PatchLayout) -> Tensor:
        """Pixels ``[P, patch_size^2 * in_chans]`` of the hidden patches, at least in float32."""
        target = patchify.gather_pixels(images, hidden)
        if target.dtype != torch.float64:
            target = target.float()
        if self.norm_pix_loss:
            mean, deviation = patchify.pixel_statistics(target)
            target = (target - mean) / deviation
        return target


def _assemble(visible_rows: Tensor, visible: PatchLayout, hidden_rows: Tensor, hidden: PatchLayout) -> Tensor:
    """Rows ``[P, D]`` of the visible and of the hidden patches -> ``[N, D, Gh, Gw]``.

    Uses index_select, which saves only the indices; index_copy would save the rows.
    """
    slots, hidden_slots = visible.slot_of_patch, hidden.slot_of_patch + visible.num_patches
    order = torch.where(slots >= 0, slots, hidden_slots).flatten()
    rows = torch.cat((visible_rows, hidden_rows)).index_select(0, order)
    return rows.view(visible.num_images, *visible.grid, rows.shape[1]).permute(0, 3, 1, 2)
