"""What the stages of the Triton backend share: whether they can run here, and compiling on all cores at once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from .setting import Setting, Skip


def require(setting: Setting) -> None:
    """Raises Skip where Triton's kernels cannot run on the stage's device."""
    from convnextv2_kernels.backends import triton

    if setting.dry_run and not triton.INTERPRETED:
        raise Skip("a dry run of Triton's kernels needs TRITON_INTERPRET=1 in the environment")
    reason = triton.unsupported_reason(setting.device, torch.float32)
    if reason is not None:
        raise Skip(f"triton cannot run: {reason}")


def feature_dtype(setting: Setting) -> torch.dtype:
    """bfloat16; what Triton's interpreter has of 16 bits in a dry run."""
    return torch.float16 if setting.dry_run else torch.bfloat16


def compile_ahead(runs: Iterable[Callable[[], object]]) -> dict:
    """Compiles the kernels that ``runs`` would launch, many at a time, and launches none; how many, and seconds.

    A compilation takes a second or more of one core and is done on first use, so that cases would wait for each in
    turn. Triton keeps what it has compiled. What fails here fails again in the case that needs it, and is reported
    there.
    """
    import triton

    from convnextv2_kernels.backends.triton import INTERPRETED
    from convnextv2_kernels.backends.triton.launch import recorded_launches

    if INTERPRETED:
        return {"launches": 0, "seconds": 0.0}
    start, count = time.monotonic(), 0
    with (
        ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 2))) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for run in runs:
            with recorded_launches() as launches, contextlib.suppress(Exception):
                run()
            for launch in launches:
                with contextlib.suppress(Exception):
                    launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
                count += 1
    return {"launches": count, "seconds": time.monotonic() - start}
