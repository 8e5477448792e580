"""Calls operators with hostile arguments, in a process of its own: ``python hostile_calls.py BACKEND FIRST STEP``.

Every operator gets a valid call of ``conformance/operators.py`` in which one argument is replaced. A line on stdout for
each case: its number and name before the call, what came of it afterwards; so that a signal shows which case it was.
The process may not take more than a gigabyte of memory beyond what PyTorch takes, nor ten seconds for a case.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conformance.backends import BACKENDS, F32, F64
from conformance.operators import COMPOSITE, ONLY, SAMPLES, Draw, names_on, operator
from torch import Tensor

from convnextv2_kernels import backends

GIBIBYTE = 2**30
SECONDS = 10
# no size of a call is as large, and the last has no sum or product in int64
INTEGERS = (0, -1, 2**31, 2**40, 2**63 - 1)
NUMBERS = (-1.0, float("nan"), float("inf"))


class Case(NamedTuple):
    """``refused``: whether it has to be an error; else it may also have a result, written in full."""

    name: str
    call: Callable[[], Any]
    refused: bool


def freed(t: Tensor) -> Tensor:
    """Sizes without memory, as sharded training leaves parameters."""
    copy = t.clone()
    copy.untyped_storage().resize_(0)
    return copy


def last_is(t: Tensor, value: int) -> Tensor:
    copy = t.clone()
    copy.view(-1)[-1] = value
    return copy


def tensors(t: Tensor, table: bool, moved: bool, alone: bool) -> Iterator[tuple[str, Tensor, bool]]:
    """``(name, replacement, whether it has to be refused)``. ``moved``: values of any type are only moved; ``alone``:
    no other tensor says what device and size are right."""
    yield "float16 of one element", torch.ones((), dtype=torch.float16), False  # where one number is enough
    yield "of another type", t.to(torch.int64 if t.is_floating_point() else F32), not moved
    yield "complex", t.to(torch.complex64), not moved
    yield "empty", t.new_empty(0), False
    yield "longer", torch.cat([t.flatten(), t.flatten()[:1]]) if t.numel() else t.new_zeros(1), False
    yield "on meta", t.to("meta"), not alone
    yield "sparse", t.to_sparse(), True
    if t.numel() > 1:
        yield "shorter", t.flatten()[1:].clone(), False
        yield "of stride 0", t.flatten()[:1].expand(t.numel()).view(t.shape), False
        yield "freed", freed(t), True
    if t.dim() > 1 and t.shape[-1] > 1 and t.shape[-2] > 1:
        yield "transposed", t.transpose(-1, -2), False
    if table and t.numel() > 1:
        for value in (-2, -(2**31), 2**31 - 1, 10**6):
            yield f"holding {value}", torch.full_like(t, value), True
            yield f"ending in {value}", last_is(t, value), True
        yield "of one value", torch.zeros_like(t), False
        yield "reversed", t.flatten().flip(0).view(t.shape), False


def replacements(name: str, argument: str, value: Any, alone: bool) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(value, Tensor):
        # the ids of kept patches may be anything: those that are no patch are ignored
        table = not value.is_floating_point() and argument != "ids"
        moved = argument in ("x", "images") and name in ("gather_patches", "scatter_patches", "patch_pixels")
        yield from tensors(value, table, moved, alone)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        for number in INTEGERS:
            yield str(number), number, number < 0
    elif isinstance(value, float):
        for number in NUMBERS:
            yield str(number), number, True
    elif isinstance(value, str):
        yield "no such name", "no such name", True
    elif isinstance(value, torch.dtype):
        yield "int64", torch.int64, True
        yield "complex64", torch.complex64, True


def cases(backend) -> Iterator[Case]:
    for name in [*names_on(backend)]:
        for optional in (True, False):
            dtype = F32 if optional or F64 not in ONLY.get(name, backend.dtypes) else F64
            run = operator(name, backend)
            names = [argument.name for argument in run._schema.arguments]
            values = SAMPLES[name](Draw(dtype, backend.device, optional, backend.name))
            alone = sum(isinstance(value, Tensor) for value in values) == 1
            for at, value in enumerate(values):
                for label, replacement, refused in replacements(name, names[at], value, alone):
                    # copies, as some operators write their arguments
                    arguments = [v.clone() if isinstance(v, Tensor) else v for v in values]
                    arguments[at] = replacement
                    yield Case(
                        f"{name}{'' if optional else ' without optional arguments'}: {names[at]} {label}",
                        lambda run=run, arguments=arguments: run(*arguments),
                        refused,
                    )


def bits(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, (tuple, list)) else () if result is None else (result,)
    return [part.reshape(-1).view(torch.uint8) for part in parts if part.numel()]


def outcome(case: Case) -> str:
    try:
        first = case.call()
    except Exception as error:
        text = str(error).strip()
        return f"refused: {type(error).__name__}: {text.splitlines()[0][:160]}" if text else "WRONG: an empty message"
    if case.refused:
        return "WRONG: accepted"
    # memory that is left unwritten holds other bytes the second time
    junk = [torch.full((n,), 77, dtype=torch.uint8) for n in (64, 256, 1024, 4096)]
    del junk
    again = case.call()
    if any(not a.is_meta and not torch.equal(a, b) for a, b in zip(bits(first), bits(again), strict=True)):
        return "WRONG: two results"
    return "a result"


def main() -> None:
    warnings.simplefilter("ignore")
    backend = next(b for b in BACKENDS if b.name == sys.argv[1])
    first, step = int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    _ = backends.get(backend.name).operators
    for name in COMPOSITE:  # what is imported on first use
        with contextlib.suppress(Exception):
            operator(name, backend)(*SAMPLES[name](Draw(F32, backend.device, True, backend.name)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTE, resource.RLIM_INFINITY))
    for number, case in enumerate(cases(backend)):
        if number < first or number % step:
            continue
        print(f"{number}\t{case.name}\t", end="", flush=True)
        signal.alarm(SECONDS)
        result = outcome(case)
        signal.alarm(0)
        print(result, flush=True)


if __name__ == "__main__":
    main()
