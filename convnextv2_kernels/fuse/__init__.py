"""Fused blocks inside models that exist: one call makes them faster and smaller, one call undoes it."""

from .api import fuse, fused, unfuse
from .report import FuseReport

__all__ = ["FuseReport", "fuse", "fused", "unfuse"]
