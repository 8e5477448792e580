"""The reference backend: plain PyTorch, differentiated by PyTorch, readable as the specification."""

from . import conv, grn_variants, mlp, norm, patches, resample

__all__ = ["conv", "grn_variants", "mlp", "norm", "patches", "resample"]
