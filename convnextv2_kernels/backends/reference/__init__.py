"""The reference backend: plain PyTorch, differentiated by PyTorch, readable as the specification."""

from . import rows, spatial

__all__ = ["rows", "spatial"]
