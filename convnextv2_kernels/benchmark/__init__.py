"""Time and memory of the sparse FCMAE step against masked dense PyTorch: ``python -m convnextv2_kernels bench``.

``compare_fcmae_step`` is one quick comparison. Ops, scaling, GPUs and more: ``python -m bench`` in a clone of the
repository.
"""

from .correctness import CorrectnessError
from .step import compare_fcmae_step

__all__ = ["CorrectnessError", "compare_fcmae_step"]
