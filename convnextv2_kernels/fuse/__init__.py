"""Fused blocks inside models that exist: one call makes them faster and smaller, one call undoes it."""

from .report import FuseReport
from .walk import fuse, fused, unfuse

__all__ = ["FuseReport", "fuse", "fused", "unfuse"]
