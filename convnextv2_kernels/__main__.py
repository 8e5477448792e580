"""``python -m convnextv2_kernels``."""

from ._console import protected_streams
from ._interrupts import leave
from .cli import main

if __name__ == "__main__":
    streams = protected_streams()
    streams.__enter__()  # until the process ends: the traceback of a bug is printed then
    raise SystemExit(leave(main()))
