"""Run the benchmark of the installed package: ``python bench/run.py --help``."""

import sys

from convnextv2_kernels.benchmark import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
