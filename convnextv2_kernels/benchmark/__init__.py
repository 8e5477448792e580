"""Time and memory of the sparse FCMAE step and of each op against masked dense PyTorch.

``main(argv)`` is the command line, ``compare_fcmae_step`` one quick comparison.
"""

from ..cli.bench import main
from .correctness import GateError
from .step import compare_fcmae_step

__all__ = ["GateError", "compare_fcmae_step", "main"]
