"""Argument checks of ops, layers and models: one sentence that names the argument, its value and what was expected."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import FLOAT_DTYPES
from ..layout import PatchLayout
from ..tracing import for_any_input

SCOPES = ("image", "batch")
ACTIVATIONS = ("gelu", "gelu_tanh")


# Arguments that have passed their checks: a step calls an op with the same shapes again and again.
_passed: set[tuple] = set()
_MOST_PASSED = 4096


def _key(tensors: Sequence[Tensor | None], layout: PatchLayout | None, settings: tuple) -> tuple:
    """All that the checks of an op look at."""
    of = tuple(None if t is None else (t.shape, t.dtype, t.device, t.requires_grad, t.layout, type(t)) for t in tensors)
    first = tensors[0]
    kind = "cpu" if first is None else first.device.type
    where = (
        None if layout is None else (type(layout), layout.num_patches, layout.num_images, layout.patch_of_slot.device)
    )
    types = tuple(map(type, settings))  # True and 1e-6 + 0j equal numbers that pass
    return of, where, settings, types, kind != "meta" and torch.is_autocast_enabled(kind)


def known(tensors: Sequence[Tensor | None], layout: PatchLayout | None, settings: tuple) -> bool:
    """Whether arguments with these shapes, dtypes and devices have passed the checks of an op before."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    try:
        return _key(tensors, layout, settings) in _passed
    except (AttributeError, TypeError, RuntimeError):  # not tensors, say, or of no shape
        return False


def remember(tensors: Sequence[Tensor | None], layout: PatchLayout | None, settings: tuple) -> None:
    """Arguments have passed their checks."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # sizes are symbols or traced tensors
        return
    if len(_passed) >= _MOST_PASSED:
        _passed.clear()
    with contextlib.suppress(TypeError):  # symbolic sizes have no hash
        _passed.add(_key(tensors, layout, settings))


def check_float(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
    check_strided(x, name)


def check_strided(x: Tensor, name: str) -> None:
    """Kernels see the memory of a tensor: it has to be one block of elements at strides."""
    if x.layout is torch.strided and not x.is_nested and type(x).__name__ != "DTensor":
        return
    kind = "a DTensor" if x.layout is torch.strided else f"of layout {x.layout}"
    raise TypeError(f"{name} is {'a nested tensor' if x.is_nested else kind}, expected a dense tensor on one device")


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
    if isinstance(numel_or_shape, tuple):
        if tuple(t.shape) != numel_or_shape:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(numel_or_shape)}")
    elif t.numel() != numel_or_shape:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {numel_or_shape} elements")
    if t.device != x.device:
        raise ValueError(f"{name} lies on {t.device}, expected the device of the input, {x.device}")
    if t.dtype != x.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(
            f"{name} has dtype {t.dtype}, expected {x.dtype}, the dtype of the input (or run under torch.autocast)"
        )


def check_scope(scope: str, name: str = "scope") -> str:
    """``scope`` if it names a GRN scope."""
    if scope not in SCOPES:
        raise ValueError(f"{name} must be 'image' or 'batch', got {scope!r}")
    return scope


def check_act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


def check_eps(eps: float, name: str = "eps") -> None:
    # a tensor is no number: on a GPU it would have to be read
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)) or not 0 <= eps < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {eps!r}")


def check_grn_eps(eps: float, name: str = "eps") -> None:
    """GRN divides by mean norm + eps, and the norms of an image without visible patches are all zero."""
    check_eps(eps, name)
    if eps == 0:
        raise ValueError(f"{name} must be a number > 0 for global response normalisation, got 0")


def check_depthwise_weight(weight: Tensor, bias: Tensor | None, x: Tensor, prefix: str = "") -> None:
    name = prefix + "weight"
    check_float(weight, name)
    c = x.shape[-1]
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{name} has shape {list(weight.shape)}, expected [C, 1, K, K] with C = {c}")
    k = weight.shape[-1]
    if k % 2 == 0 or not 3 <= k <= 11:
        raise ValueError(f"{name} has kernel size {k}, expected an odd K from 3 to 11")
    check_param(weight, name, (c, 1, k, k), x)
    if bias is not None:
        check_param(bias, prefix + "bias", (c,), x)


def check_drop_path_scale(scale: Tensor | None, num_images: int, x: Tensor) -> None:
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


def check_visible(visible: Tensor, x: Tensor, layout: PatchLayout | None) -> None:
    """``visible [N, H, W, 1]`` hides sites of a dense map ``x [N, H, W, C]``."""
    if layout is not None:
        raise ValueError("visible must be None with a layout, whose packed maps have no hidden sites, got a tensor")
    if not isinstance(visible, Tensor):
        raise TypeError(f"visible must be a torch.Tensor or None, got {type(visible).__name__}")
    check_strided(visible, "visible")
    expected = (*x.shape[:3], 1)
    if tuple(visible.shape) != expected:
        raise ValueError(f"visible has shape {list(visible.shape)}, expected {list(expected)}, one value per site")
    if visible.device != x.device:
        raise ValueError(f"visible lies on {visible.device}, expected the device of the input, {x.device}")


# -- arguments of layers and models


def check_positive(name: str, value: int) -> int:
    """``value`` if it is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def check_drop_path_rate(rate: float, name: str = "drop_path") -> float:
    """``rate`` if it is a probability below 1: at 1 nothing is kept and the kept scale is
    infinite."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {rate!r}")
    return float(rate)


def check_layer_scale(value: float | None) -> float | None:
    """The first value of a layer scale, or None for none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
        raise ValueError(f"layer_scale must be a finite number other than 0, or None for none, got {value!r}")
    return float(value)


def check_stages(depths: Sequence[int], dims: Sequence[int]) -> None:
    """Four positive depths and four positive widths."""
    for name, values in (("depths", depths), ("dims", dims)):
        if len(values) != 4:
            raise ValueError(f"{name} must have one entry per stage, 4 in all, got {tuple(values)}")
        for stage, value in enumerate(values):
            check_positive(f"{name}[{stage}]", value)


def check_images(images: Tensor, in_chans: int, multiple: int, any_size: bool = False) -> None:
    """Floating-point ``[N, in_chans, H, W]`` with H and W multiples of ``multiple``, or with
    ``any_size`` at least that."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if not images.dtype.is_floating_point:
        raise TypeError(f"images must be of a floating-point dtype, got {images.dtype}")
    check_strided(images, "images")
    if images.dim() != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images must have shape [N, {in_chans}, H, W], got {list(images.shape)}")
    height, width = images.shape[2:]
    if any_size:
        if min(height, width) < multiple:
            raise ValueError(f"images must have sides of at least {multiple} pixels, got {height}x{width}")
    elif height % multiple or width % multiple or not height or not width:
        raise ValueError(f"images must have sides that are multiples of {multiple}, got {height}x{width}")


def check_layout_of_images(layout: PatchLayout, images: Tensor) -> None:
    """The layout divides these images into square patches whose side is a multiple of 32."""
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout must be a PatchLayout, got {type(layout).__name__}")
    if layout.num_images != images.shape[0]:
        raise ValueError(f"layout is of {layout.num_images} images, but images holds {images.shape[0]}")
    (rows, columns), (height, width) = layout.grid, images.shape[2:]
    patch = height // rows
    if patch % 32 or not patch or (rows * patch, columns * patch) != (height, width):
        raise ValueError(
            f"layout has a grid of {rows}x{columns} patches, which does not divide images of "
            f"{height}x{width} into square patches with a side that is a multiple of 32"
        )
    if layout.device != images.device:
        raise ValueError(f"layout is on {layout.device}, but images is on {images.device}")


def as_layout(mask: Tensor | PatchLayout, num_images: int, grid: tuple[int, int], device: torch.device) -> PatchLayout:
    """Layout of a mask ``[N, Gh, Gw]`` or ``[N, Gh*Gw]``, bool or 0/1 with 1 = hidden, or of a
    ready layout."""
    if isinstance(mask, PatchLayout):
        if mask.num_images != num_images or tuple(mask.grid) != grid:
            raise ValueError(
                f"mask is a layout of {mask.num_images} images on grid {tuple(mask.grid)}, but "
                f"images holds {num_images} on grid {grid}"
            )
        if mask.device != device:
            raise ValueError(f"mask is on {mask.device}, but images is on {device}")
        return mask
    return PatchLayout.from_mask(as_bool_mask(mask, num_images, grid, device))


def as_bool_mask(mask: Tensor, num_images: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """``[N, Gh, Gw]`` bool of a mask in any of the accepted forms."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor or a PatchLayout, got {type(mask).__name__}")
    check_strided(mask, "mask")
    rows, columns = grid
    accepted = ([num_images, rows, columns], [num_images, rows * columns])
    if list(mask.shape) not in accepted:
        raise ValueError(f"mask must have shape {accepted[0]} or {accepted[1]}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}, but images is on {device}")
    if mask.dtype != torch.bool:
        hidden = mask == 1
        if not for_any_input() and not bool((hidden | (mask == 0)).all()):
            raise ValueError("mask must hold only 0 (visible) and 1 (hidden), got other values")
        mask = hidden
    return mask.reshape(num_images, rows, columns)
