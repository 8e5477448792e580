"""Exact sparse ConvNeXt V2 and FCMAE: fused kernels over packed visible patches, forward and backward."""

from . import models, nn, ops
from .backends import use_backend
from .graphs import make_graphed_step
from .info import info
from .layout import PatchLayout, random_kept, random_mask
from .version import __version__

__all__ = [
    "PatchLayout",
    "info",
    "make_graphed_step",
    "models",
    "nn",
    "ops",
    "random_kept",
    "random_mask",
    "use_backend",
    "__version__",
]
