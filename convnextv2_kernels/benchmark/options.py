"""Settings of a run and its time budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What to measure; see the command line's help for each."""

    models: tuple[str, ...] = ("convnextv2_atto", "convnextv2_tiny")
    batch_size: int = 8
    img_size: int = 224
    repeats: int = 10
    step: bool = True
    ops: bool = True
    compile: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    output: Path = Path("bench_output")
    time_budget: float | None = None
    seed: int = 0
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class Budget:
    """Time left; without a limit there is always more.

    A part of a run that starts in time is finished; the overrun is that of one part.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.deadline = None if seconds is None else clock() + seconds

    def part(self, share: float) -> Budget:
        """A budget of this share of the time that is left now."""
        if self.deadline is None:
            return Budget(None, self.clock)
        return Budget(share * (self.deadline - self.clock()), self.clock)

    @property
    def spent(self) -> bool:
        return self.deadline is not None and self.clock() >= self.deadline
