"""Models with the official names: the dense classifier and the masked autoencoder."""

from __future__ import annotations

from typing import Any

from ..sizes import CONFIGS, ModelConfig, block_of, get_config
from .backbone import SparseEncoder
from .convnextv2 import ConvNeXtV2, ConvNeXtV2Features
from .fcmae import FCMAE
from .patchify import patchify, unpatchify

__all__ = [
    "CONFIGS",
    "FCMAE",
    "ConvNeXtV2",
    "ConvNeXtV2Features",
    "ModelConfig",
    "SparseEncoder",
    "create_fcmae",
    "create_model",
    "get_config",
    "patchify",
    "unpatchify",
]


def create_model(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, features_only: bool = False, **kwargs: Any
) -> ConvNeXtV2 | ConvNeXtV2Features:
    """Classifier called ``convnextv2_<size>``, or ``convnext_<size>`` of V1; ``kwargs`` go to :class:`ConvNeXtV2`.

    With ``features_only``, a backbone without a head that returns the maps of its stages;
    ``kwargs`` (``out_indices`` among them) go to :class:`ConvNeXtV2Features`.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or an argument out of range.
    """
    depths, dims = get_config(name)
    kwargs = {**block_of(name), **kwargs, "depths": depths, "dims": dims, "drop_path_rate": drop_path_rate}
    return ConvNeXtV2Features(**kwargs) if features_only else ConvNeXtV2(num_classes=num_classes, **kwargs)


def create_fcmae(name: str, **kwargs: Any) -> FCMAE:
    """Masked autoencoder with the encoder ``convnextv2_<size>``, or ``convnext_<size>`` of V1; ``kwargs`` go to
    :class:`FCMAE`.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or an argument out of range.
    """
    depths, dims = get_config(name)
    return FCMAE(depths, dims, **{**block_of(name), **kwargs})
