"""Fused blocks in existing models: one call makes them faster and saves memory, another undoes it."""

from .api import fuse, fused, unfuse
from .report import FuseReport

__all__ = ["FuseReport", "fuse", "fused", "unfuse"]
