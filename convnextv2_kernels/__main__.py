"""``python -m convnextv2_kernels``."""

import os
import sys

from .cli import main

if __name__ == "__main__":
    code = main()
    if code > 128:
        # Told to stop, and everything is in order: do not wait for a thread that waits for a file.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
