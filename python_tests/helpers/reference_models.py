"""timm and transformers, imported so that their tests run beside any PyTorch.

torchvision's wheel on PyPI is built for CUDA. Beside a CPU build of PyTorch its extension does not load, and importing
it (which timm always does) fails for want of two operators that nobody here calls. Declaring them is enough.
"""

import sys

import torch

_declared = None  # a Library undoes its declarations when it is deleted


def _import_torchvision() -> None:
    global _declared
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


_import_torchvision()

import timm  # noqa: E402
import transformers  # noqa: E402

__all__ = ["timm", "transformers"]
