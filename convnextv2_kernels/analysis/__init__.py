"""What a ConvNeXt V2 has learned, by the analyses of its paper: feature cosine distance (Figure 4), class selectivity
(Figure 7) and activation maps (Figure 3), and by reconstructions.

The official code has none of them; ``docs/analysis.md`` says what the paper leaves open and what is done here. Names
are imported when they are first asked for, so that the command line starts without waiting for PyTorch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "activations": ("ActivationMaps", "activation_maps", "save_activation_maps"),
    "networks": ("Arm", "load_arm", "untrained_arm"),
    "channels": ("channels_near_constant", "channels_near_zero"),
    "cosine": ("CosineByLayer", "LayerCosine", "cosine_by_layer", "feature_cosine_distance"),
    "plots": ("save_cosine_plot", "save_selectivity_plot"),
    "reconstruct": ("draw_masks", "errors_by_image"),
    "selectivity": (
        "ClassSelectivity",
        "LayerSelectivity",
        "class_selectivity_index",
        "selectivity_by_layer",
        "selectivity_density",
    ),
    "layer_features": ("TAPS", "Tapped", "block_names", "hidden_features", "tapped"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
