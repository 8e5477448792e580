"""Launches and operators. All launches go through one function, so that tests and the compiler's report see every one.
Kernels that are called from outside the schedule are operators ``torch.ops.convnextv2_kernels_triton``, opaque to
torch.compile and torch.export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import _contracts, _fakes, _flops
from .availability import INTERPRETED


class Launch(NamedTuple):
    """A kernel with everything that determines its compilation. ``arguments`` by name, including constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler. We want fused multiply-adds, which Triton 3.10 disables by default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, kernels do not run: their launches are recorded. Works with tensors on the device "meta"."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 2, **arguments) -> None:
    """Runs a kernel on the current stream of its tensors' device. A grid with a zero has no work."""
    if 0 in grid:
        return
    call = Launch(kernel, grid, arguments, num_warps, num_stages)
    if _recorded is not None:
        _recorded.append(call)
        return
    with _device_of(arguments):
        kernel[grid](**arguments, **call.options)


def _device_of(arguments: dict[str, Any]) -> contextlib.AbstractContextManager:
    """Makes the device of the tensors current, because Triton launches on the current device."""
    if not INTERPRETED:
        index = next(a.device.index for a in arguments.values() if isinstance(a, Tensor))
        if index != torch.cuda.current_device():
            return torch.cuda.device(index)
    return contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: Triton's tiles have such sizes."""
    return 1 << max(0, n - 1).bit_length()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype of sums over features of a dtype, as a constant for a kernel."""
    return tl.float64 if dtype == torch.float64 else tl.float32


NAMESPACE = "convnextv2_kernels_triton"
# the functions behind the operators, whose fakes would answer on the device "meta"
FUNCTIONS: dict[str, Callable] = {}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(function):
    """Registers a function that only reads its arguments and returns new tensors, and returns the operator.

    Its annotations are the schema; names, arguments and results match the operator of the same name in ``csrc/torch``,
    so that both share one fake. It checks its arguments (``_contracts.py``)."""
    name = function.__name__
    FUNCTIONS[name] = function
    check = _contracts.of(name)

    def checked(*args):
        check(*args)
        return function(*args)

    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, checked, "CompositeExplicitAutograd")
    _fakes.register(NAMESPACE, name)
    _flops.register(NAMESPACE, name)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
