"""What a ConvNeXt V2 has learned, by the analyses of its paper: feature cosine distance (Figure 4), class selectivity
(Figure 7) and activation maps (Figure 3), and by reconstructions.

The official code has none of them; ``docs/analysis.md`` says what the paper leaves open and what is done here.
"""

from ..train.reconstruction import draw_masks, errors_by_image
from .activations import ActivationMaps, activation_maps, save_activation_maps
from .channels import channels_near_constant, channels_near_zero
from .cosine import CosineByLayer, LayerCosine, cosine_by_layer, feature_cosine_distance
from .features import TAPS, Tapped, block_names, hidden_features, tapped
from .networks import Network, load_network, untrained_network
from .plots import save_cosine_plot, save_selectivity_plot
from .selectivity import (
    ClassSelectivity,
    LayerSelectivity,
    class_selectivity_index,
    selectivity_by_layer,
    selectivity_density,
)

__all__ = [
    "TAPS",
    "ActivationMaps",
    "ClassSelectivity",
    "CosineByLayer",
    "LayerCosine",
    "LayerSelectivity",
    "Network",
    "Tapped",
    "activation_maps",
    "block_names",
    "channels_near_constant",
    "channels_near_zero",
    "class_selectivity_index",
    "cosine_by_layer",
    "draw_masks",
    "errors_by_image",
    "feature_cosine_distance",
    "hidden_features",
    "load_network",
    "save_activation_maps",
    "save_cosine_plot",
    "save_selectivity_plot",
    "selectivity_by_layer",
    "selectivity_density",
    "tapped",
    "untrained_network",
]
