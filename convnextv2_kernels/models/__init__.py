"""Models with the official names: the dense classifier and the masked autoencoder."""

from __future__ import annotations

from typing import Any

from .config import CONFIGS, ModelConfig, get_config
from .convnextv2 import ConvNeXtV2
from .encoder import SparseEncoder
from .fcmae import FCMAE
from .pixels import patchify, unpatchify

__all__ = [
    "CONFIGS",
    "FCMAE",
    "ConvNeXtV2",
    "ModelConfig",
    "SparseEncoder",
    "create_fcmae",
    "create_model",
    "get_config",
    "patchify",
    "unpatchify",
]


def create_model(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, **kwargs: Any
) -> ConvNeXtV2:
    """Classifier called ``convnextv2_<size>``; ``kwargs`` go to :class:`ConvNeXtV2`.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or an argument out of range.
    """
    depths, dims = get_config(name)
    return ConvNeXtV2(
        num_classes=num_classes,
        depths=depths,
        dims=dims,
        drop_path_rate=drop_path_rate,
        **kwargs,
    )


def create_fcmae(name: str, **kwargs: Any) -> FCMAE:
    """Masked autoencoder with the encoder ``convnextv2_<size>``; ``kwargs`` go to :class:`FCMAE`.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or an argument out of range.
    """
    depths, dims = get_config(name)
    return FCMAE(depths, dims, **kwargs)
