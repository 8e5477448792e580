"""``python -m convnextv2_kernels``."""

from ._interrupts import leave
from .cli import main

if __name__ == "__main__":
    raise SystemExit(leave(main()))
