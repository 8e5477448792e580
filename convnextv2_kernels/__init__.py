"""Exact sparse ConvNeXt V2 and FCMAE: fused kernels over packed visible patches, forward and backward."""

from . import ops
from .backends import use_backend
from .layout import PatchLayout, random_kept, random_mask
from .version import __version__



__all__ = ["PatchLayout", "ops", "random_kept", "random_mask", "use_backend", "__version__"]
