"""Exact sparse ConvNeXt V2 and FCMAE: fused kernels over packed visible patches, forward and backward."""

from . import _interrupts  # noqa: F401  (first: the imports that follow take seconds)

# isort: split
from . import models, nn, ops
from ._info import info
from .backends import use_backend
from .checkpoints import LoadReport, convert_state_dict, load_checkpoint
from .fuse import FuseReport, fuse, fused, unfuse
from .graphs import make_graphed_step
from .layout import PatchLayout, random_kept, random_mask
from .version import __version__

__all__ = [
    "FuseReport",
    "LoadReport",
    "PatchLayout",
    "__version__",
    "convert_state_dict",
    "fuse",
    "fused",
    "info",
    "load_checkpoint",
    "make_graphed_step",
    "models",
    "nn",
    "ops",
    "random_kept",
    "random_mask",
    "unfuse",
    "use_backend",
]
