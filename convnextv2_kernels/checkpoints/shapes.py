"""The shapes that code bases give the same parameter.

The canonical shapes are those of the official dense code: convolutions ``(out, in / groups, kh, kw)``, linear maps
``(out, in)``, GRN ``(1, 1, 1, 4C)``, everything else ``(C,)``. No value is ever computed, only moved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from .formats import LAYER_SCALE, other_decoder

_VECTOR = re.compile(r".*\.bias|(.*\.)?norm\.weight|hidden_states_norms\..*|downsample_layers\.(0\.1|[1-3]\.0)\.weight")
_LINEAR = re.compile(r".*\.pwconv[12]\.weight|head\.weight")
# In the official sparse code the encoder's convolutions, except for the stem, are MinkowskiEngine's.
_SPARSE_BIAS = re.compile(r"(stages\..*\.dwconv|downsample_layers\.[1-3]\.1)\.bias")


def to_canonical(name: str, tensor: Tensor) -> Tensor:
    """View in the canonical shape of the parameter with this canonical name; writing to it writes to ``tensor``.

    Accepts, besides the canonical shape: biases ``(1, C)``, layer scale ``(C, 1, 1)``, GRN of any rank, linear maps as
    1x1 convolutions, and MinkowskiEngine's kernels ``(K*K, C)`` (depthwise) and ``(K*K, in, out)``, whose offset is
    ``kw * K + kh``.

    Raises:
        ValueError: a tensor of any other shape.
    """
    shape, view = tensor.shape, tensor
    if is_free(name):
        return view
    if ".grn." in name:
        rank = 4
        if view.dim() and view.numel() == shape[-1]:
            view = view.reshape(1, 1, 1, -1)
    elif LAYER_SCALE.fullmatch(name):
        rank = 1
        if view.dim() == 3 and shape[1:] == (1, 1):
            view = view[:, 0, 0]
    elif _VECTOR.fullmatch(name):
        rank = 1
        if view.dim() == 2 and shape[0] == 1:
            view = view[0]
    elif _LINEAR.fullmatch(name):
        rank = 2
        if view.dim() == 4 and shape[2:] == (1, 1):
            view = view[:, :, 0, 0]
    else:
        rank = 4
        side = isqrt(shape[0]) if view.dim() in (2, 3) else 0
        if side and side * side == shape[0]:
            kernel = view.unflatten(0, (side, side))  # kw, kh, (in,) out
            view = kernel.permute(3, 2, 1, 0) if view.dim() == 3 else kernel.permute(2, 1, 0).unsqueeze(1)
    if view.dim() != rank:
        raise ValueError(f"no parameter {name} has shape {list(shape)}")
    return view


def is_free(name: str) -> bool:
    """Whether a canonical name is of a layer in GRN's place, or in a decoder that is no row of blocks: one code base
    has these, and the model compares their shapes."""
    return ".grn.layer." in name or other_decoder((name,)) is not None


def from_canonical(name: str, tensor: Tensor, to: str, conv_mlp: bool) -> Tensor:
    """Contiguous tensor in the shape that format ``to`` gives the parameter with this canonical name.

    ``conv_mlp``: whether timm's pointwise layers are 1x1 convolutions instead of linear maps.
    """
    is_grn = ".grn." in name
    if to in ("timm", "mmpretrain") and is_grn:
        tensor = tensor.flatten()
    elif to == "torchvision" and LAYER_SCALE.fullmatch(name):
        tensor = tensor[:, None, None]
    elif to == "timm" and conv_mlp and ".pwconv" in name and name.endswith(".weight"):
        tensor = tensor[:, :, None, None]
    elif to == "official-sparse" and not name.startswith("decoder."):
        if is_grn:
            tensor = tensor.flatten(0, 2)
        elif _SPARSE_BIAS.fullmatch(name):
            tensor = tensor[None]
        elif name.endswith(".dwconv.weight"):
            tensor = tensor.squeeze(1).permute(2, 1, 0).flatten(0, 1)
        elif re.fullmatch(r"downsample_layers\.[1-3]\.1\.weight", name):
            tensor = tensor.permute(3, 2, 1, 0).flatten(0, 1)
    return tensor.contiguous()


def contradictions(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Canonical names of a complete checkpoint whose shapes contradict the others', each with the shape that follows
    from these: the widths of the stages and of the decoder, four times as many hidden channels in a block, square
    kernels of one side a stage, the number of classes."""
    dims = [tensors[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in range(4)]
    decoder = tensors["proj.weight"].shape[0] if "proj.weight" in tensors else 0
    narrow = other_decoder(tensors) is not None  # the width of its last level may be another
    wrong = {}
    for name, tensor in tensors.items():
        if is_free(name) or (narrow and name == "pred.weight"):
            continue
        expected = _follows(name, tensors, dims, decoder)
        if tuple(tensor.shape) != expected:
            wrong[name] = expected
    return wrong


def _follows(name: str, tensors: Mapping[str, Tensor], dims: list[int], decoder: int) -> tuple[int, ...]:
    shape, last = tensors[name].shape, dims[-1]
    if block := re.fullmatch(r"((stages)\.(\d)|decoder)\.\d+\.(.*)", name):
        width = dims[int(block[3])] if block[2] else decoder
        hidden = 4 * width
        side = tensors[f"{block[1]}.0.dwconv.weight"].shape[-1]
        if ".grn." in name:
            return (1, 1, 1, hidden)
        return {
            "dwconv.weight": (width, 1, side, side),
            "pwconv1.weight": (hidden, width),
            "pwconv1.bias": (hidden,),
            "pwconv2.weight": (width, hidden),
        }.get(block[4], (width,))
    if between := re.fullmatch(r"downsample_layers\.(\d)\.(\d)\.(\w+)", name):
        stage, layer = int(between[1]), int(between[2])
        is_convolution = layer == (0 if stage == 0 else 1)
        if is_convolution and between[3] == "weight":
            return (dims[stage], shape[1] if stage == 0 else dims[stage - 1], shape[-1], shape[-1])
        return (dims[stage] if stage == 0 or is_convolution else dims[stage - 1],)
    if output := re.fullmatch(r"hidden_states_norms\.(?:stem|stage(\d))\.\w+", name):
        return (dims[int(output[1] or 1) - 1],)
    return {
        "head.weight": (shape[0], last),
        "head.bias": (tensors["head.weight"].shape[0],) if "head.weight" in tensors else (),
        "proj.weight": (decoder, last, 1, 1),
        "proj.bias": (decoder,),
        "mask_token": (1, decoder, 1, 1),
        "pred.weight": (shape[0], decoder, 1, 1),
        "pred.bias": (tensors["pred.weight"].shape[0],) if "pred.weight" in tensors else (),
    }.get(name, (last,))
