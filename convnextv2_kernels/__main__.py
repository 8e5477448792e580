"""``python -m convnextv2_kernels``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
