"""timm, imported when it is first needed. Nothing else in this package may import timm or torchvision."""

import sys
from functools import cache
from types import ModuleType

import torch

from ..errors import UserError
from .images import describe

INSTALL = 'pip install "convnextv2_kernels[train]"'
# What importing torchvision raises where its extension did not load: its wheel on PyPI is built for CUDA.
_BROKEN = "operator torchvision::nms does not exist"
_declared: torch.library.Library | None = None  # a Library takes its declarations back when it is deleted


@cache
def timm() -> ModuleType:
    """Return timm, with ``timm.data`` imported. Data-loading processes of type spawn must call this too.

    timm imports torchvision, whose CUDA wheel does not import beside a CPU build of PyTorch for want of two operators
    that nothing here calls. In that case, and no other, they are declared.

    Raises:
        UserError: timm or torchvision is not installed.
    """
    try:
        _import_torchvision()
        import timm.data
    except ImportError as error:
        raise UserError(
            f"fine-tuning takes augmentation from timm, which cannot be imported ({describe(error)}); "
            f"install it with {INSTALL}, naming your PyTorch in the same command."
        ) from error
    return timm


def _import_torchvision() -> None:
    global _declared
    try:
        import torchvision
    except RuntimeError as error:
        if _BROKEN not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
