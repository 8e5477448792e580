"""The reference backend: plain PyTorch, differentiated by PyTorch, readable as the specification."""

from . import conv, norm

__all__ = ["conv", "norm"]
