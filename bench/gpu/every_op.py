"""Calls every CUDA operator and every public op, forward and backward, on small shapes: for compute-sanitizer.

python -m bench.gpu.every_op SETTING_JSON
"""

from __future__ import annotations

import sys

import torch
from conformance.samples import SPECS, cotangent_of, make_sample

from .kernels import all_cases
from .operators import Draw, namespace
from .setting import Setting


def main(setting: Setting) -> int:
    """Number of calls."""
    calls = 0
    ops = namespace(setting)
    for dtype in (torch.bfloat16, torch.float32):
        draw = Draw(setting.device, dtype)
        for case in all_cases(ops, dry_run=True):
            if not case.peer:
                case.make(draw, 1)[0]()
                calls += 1
        for op in SPECS:
            sample = make_sample(op).cast(dtype, setting.device)
            out = sample.run(setting.backend)["out"]
            sample.run(setting.backend, cotangent_of(out, dtype).to(setting.device))
            calls += 2
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    print(f"calls: {main(Setting.from_json(sys.argv[1]))}")
