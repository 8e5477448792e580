"""Checkpoints of every ConvNeXt V2 and V1 code base: reading, writing and conversion."""

from .convert import convert_state_dict
from .load import LoadReport, load_checkpoint

__all__ = ["LoadReport", "convert_state_dict", "load_checkpoint"]
