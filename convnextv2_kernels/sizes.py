"""The published sizes of ConvNeXt V2 and V1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class ModelConfig(NamedTuple):
    """Blocks and width of each of the four stages."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]


# All sizes of the paper (A.1), and timm's "small", which the paper leaves out.
CONFIGS: dict[str, ModelConfig] = {
    "convnextv2_atto": ModelConfig((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": ModelConfig((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": ModelConfig((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": ModelConfig((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": ModelConfig((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_small": ModelConfig((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnextv2_base": ModelConfig((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": ModelConfig((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": ModelConfig((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
V2_NAMES = tuple(CONFIGS)
# ConvNeXt V1: tiny to xlarge of its paper, and timm's atto to nano, which Table 14 compares with V2's.
CONFIGS |= {name.replace("v2_", "_"): config for name, config in CONFIGS.items() if name != "convnextv2_huge"}
CONFIGS["convnext_xlarge"] = ModelConfig((3, 3, 27, 3), (256, 512, 1024, 2048))
V1_NAMES = tuple(name for name in CONFIGS if name not in V2_NAMES)
V1_BLOCK: dict[str, Any] = {"grn": "none", "layer_scale": 1e-6}


def get_config(name: str) -> ModelConfig:
    """The configuration called ``convnextv2_<size>``, or ``convnext_<size>`` of V1.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return CONFIGS[name]
    except KeyError:
        names = ", ".join(CONFIGS)
        raise ValueError(f"model name must be one of {names}; got {name!r}") from None


def block_of(name: str) -> dict[str, Any]:
    """``grn`` and ``layer_scale`` of the blocks of a size, where they are not the defaults of V2."""
    return dict(V1_BLOCK) if name in V1_NAMES else {}


def size_of(depths: Sequence[int], dims: Sequence[int], v1: bool = False) -> str | None:
    """The name of the published size with these blocks and widths, of V2 or of V1; None if there is none."""
    given = (tuple(depths), tuple(dims))
    return next((name for name in (V1_NAMES if v1 else V2_NAMES) if CONFIGS[name] == given), None)


def size_text(size: Sequence[int]) -> str:
    """``HxW`` of the (height, width) of an image, for people."""
    return "x".join(map(str, size))
