"""Checks that need a new process: another instruction set, the number of threads, and fakes before any first use.

Prints one line of JSON; wrong values end it with an AssertionError. Run by test_fresh_process.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import convnextv2_kernels as ck
from convnextv2_kernels.backends import native

from .backends import BF16, F32, F64
from .samples import make_sample
from .tolerance import check

SAMPLES = [
    ("scatter_patches", {}),
    ("submanifold_depthwise_conv2d", {"at": ("ragged", 8), "c": 17, "k": 7}),
    ("submanifold_depthwise_conv2d", {"at": ("dense_14x9", None), "c": 40, "k": 7}),
    ("submanifold_depthwise_conv2d", {"at": ("ragged", 1), "c": 37, "k": 7}),
    ("submanifold_depthwise_conv2d", {"at": ("uniform", 3), "c": 5, "k": 11}),
    ("depthwise_conv_layer_norm", {"at": ("uniform", 4), "c": 23, "k": 7}),
    ("layer_norm", {"c": 41}),
    ("global_response_norm", {"c": 41}),
    ("gelu_grn", {"c": 9}),
    ("gelu_grn", {"c": 72, "scope": "batch"}),
    ("layer_norm_grn", {"c": 41}),
    ("pointwise_mlp", {"c": 24, "hidden": 96, "out_c": 24, "at": ("uniform", 4)}),
    ("patch_embed", {"c": 24, "in_chans": 3, "at": ("ragged", 4)}),
    ("downsample", {"c": 20, "out_c": 40}),
    ("convnextv2_block", {"c": 24, "hidden": 96, "k": 7, "at": ("ragged", 4)}),
]


def _threads() -> int | None:
    try:
        return len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return None


def _threads_used(count: int) -> int | None:
    """Number of threads of this process after a convolution and a norm under ``torch.set_num_threads(count)``."""
    torch.set_num_threads(count)
    x = torch.zeros(16, 16, 16, 64)
    with torch.no_grad():
        y = ck.ops.submanifold_depthwise_conv2d(x, torch.zeros(64, 1, 7, 7))
        ck.ops.gelu_grn(y, torch.zeros(64), torch.zeros(64))
    return _threads()


def _fakes_work() -> bool:
    """Whether an operator can be traced before any kernel has been called."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        try:
            return torch.ops.convnextv2_kernels.column_sum(torch.empty(4, 3)).shape == (3,)
        except torch._subclasses.fake_tensor.UnsupportedOperatorException:
            return False


def main() -> None:
    fakes = _fakes_work()
    torch.set_num_threads(1)
    idle = _threads()
    threads = [idle, _threads_used(1), _threads_used(2)]
    torch.set_num_threads(1)
    for op, axes in SAMPLES:
        for dtype in (F32, BF16, F64):
            check(make_sample(op, **axes), "cpu", dtype)
    print(json.dumps({"isa": native.module.cpu_isa()[0], "threads": threads, "fakes": fakes}))


if __name__ == "__main__":
    main()
