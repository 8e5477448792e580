"""Argument checks shared by the public ops: one sentence that names the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import PatchLayout

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCOPES = ("image", "batch")


def check_float(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")


def check_layout(layout: PatchLayout, x: Tensor, name: str) -> None:
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout must be a PatchLayout or None, got {type(layout).__name__}")
    if layout.device != x.device:
        raise ValueError(f"layout lies on {layout.device}, expected the device of {name}, {x.device}")


def check_packed(x: Tensor, layout: PatchLayout | None, name: str = "x") -> None:
    """``x`` is packed ``[P, s, s, C]`` of this layout, or dense ``[N, H, W, C]`` when ``layout`` is None."""
    check_float(x, name)
    if x.dim() != 4:
        kind = "[N, H, W, C]" if layout is None else "[P, s, s, C]"
        raise ValueError(f"{name} has shape {list(x.shape)}, expected four dimensions {kind}")
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected sides >= 1 and C >= 1")
    if layout is None:
        return
    check_layout(layout, x, name)
    if x.shape[1] != x.shape[2]:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, expected square packed patches [P, s, s, C] for a layout "
            "(use layout=None for a dense NHWC map)"
        )
    if x.shape[0] != layout.num_patches:
        raise ValueError(
            f"{name} holds {x.shape[0]} patches, expected {layout.num_patches}, the visible patches of layout; "
            "it may belong to another batch"
        )


def check_dense(x: Tensor, layout: PatchLayout, name: str = "x") -> int:
    """``x`` is a dense NHWC map of this layout's batch; returns the patch side s."""
    check_float(x, name)
    check_layout(layout, x, name)
    gh, gw = layout.grid
    if x.dim() != 4 or x.shape[0] != layout.num_images:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, expected [N, H, W, C] with the {layout.num_images} images of layout"
        )
    h, w = x.shape[1], x.shape[2]
    if h % gh or w % gw or h // gh != w // gw or h < gh:
        raise ValueError(f"{name} is {h}x{w} pixels, expected {gh}s x {gw}s for the layout's grid {gh}x{gw}")
    return h // gh


def check_param(t: Tensor, name: str, numel_or_shape: int | tuple[int, ...], x: Tensor) -> None:
    """A parameter has the given shape (or, for an int, that many elements), x's device, and x's dtype.

    Under autocast the dtype may differ: parameters are then cast as the AMP table says.
    """
    check_float(t, name)
    if isinstance(numel_or_shape, int):
        if t.numel() != numel_or_shape:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {numel_or_shape} elements")
    elif tuple(t.shape) != numel_or_shape:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(numel_or_shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} lies on {t.device}, expected the device of the input, {x.device}")
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name} has dtype {t.dtype}, expected {x.dtype}, the dtype of the input (or run under torch.autocast)"
        )


def check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope must be 'image' or 'batch', got {scope!r}")


def check_eps(eps: float, name: str = "eps") -> None:
    if not eps >= 0:
        raise ValueError(f"{name} must be a number >= 0, got {eps!r}")


def check_grn_eps(eps: float, name: str = "eps") -> None:
    """GRN divides by mean norm + eps, and the norms of an image without visible patches are all zero."""
    check_eps(eps, name)
    if eps == 0:
        raise ValueError(f"{name} must be a number > 0 for global response normalisation, got 0")


def check_depthwise_weight(weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    check_float(weight, "weight")
    c = x.shape[-1]
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [C, 1, K, K] with C = {c}")
    k = weight.shape[-1]
    if k % 2 == 0 or not 3 <= k <= 11:
        raise ValueError(f"weight has kernel size {k}, expected an odd K from 3 to 11")
    check_param(weight, "weight", (c, 1, k, k), x)
    if bias is not None:
        check_param(bias, "bias", (c,), x)


def check_drop_path(scale: Tensor | None, num_images: int, x: Tensor) -> None:
    if scale is None:
        return
    check_float(scale, "drop_path_scale")
    if scale.numel() != num_images:
        raise ValueError(
            f"drop_path_scale has shape {list(scale.shape)}, expected [{num_images}], one factor per image"
        )
    if scale.device != x.device:
        raise ValueError(f"drop_path_scale lies on {scale.device}, expected the device of the input, {x.device}")
    if scale.requires_grad:
        raise ValueError("drop_path_scale requires grad, expected a constant: no gradient is defined for it")
