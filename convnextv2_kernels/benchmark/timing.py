"""Interleaved timing with a control, so that drift of the machine and what one side leaves behind fall on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MIN_ROUNDS = 3
CONTROL_TOLERANCE = 0.03


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


@dataclass(frozen=True)
class Control:
    """A baseline against a copy of itself, timed among the rest: what the comparison makes of no difference at all.

    Attributes:
        of: the baseline's name.
        ratio: time of the copy over that of the baseline, None where no copy could be timed.
        reason: why not.
    """

    of: str
    ratio: float | None
    reason: str | None = None

    @classmethod
    def from_samples(cls, of: str, original: Sequence[float], copy: Sequence[float]) -> Control:
        """From the times of both, in any unit."""
        return cls(of, statistics.median(copy) / statistics.median(original))

    @property
    def valid(self) -> bool:
        """Whether the ratio is 1 within 3 %; without one nothing shows that times can be compared."""
        return self.ratio is not None and abs(self.ratio - 1) <= CONTROL_TOLERANCE

    def to_json(self) -> dict:
        found = {"of": self.of, "ratio": self.ratio, "tolerance": CONTROL_TOLERANCE, "valid": self.valid}
        return found if self.reason is None else {**found, "reason": self.reason}


def control_sentence(control: dict | None) -> str | None:
    """What a reader of the times must know of a result's control, None where it is as it should be."""
    if control is None:
        return "measured without a control"
    if control["valid"]:
        return None
    if control["ratio"] is None:
        return f"INVALID: no control, {control['reason']}"
    return (
        f"INVALID: a copy of {control['of']} took {control['ratio']:.3f} times as long as it did, expected 1 within "
        f"{control['tolerance']:.0%}"
    )


def orders(count: int) -> list[list[int]]:
    """Orders of ``count`` variants in which each follows each other one equally often (a Williams design)."""
    zigzag = [(step + 1) // 2 if step % 2 else (count - step // 2) % count for step in range(count)]
    rows = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    deadline: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, by name: every round runs each once.

    Args:
        steps: what to time, already warm.
        rounds: how many rounds.
        deadline: value of ``clock`` after which no further round starts, once three are done.
        after_round: called when a round is over, to show progress.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    # No variant always inherits the cache and the heap of the same neighbour.
    design = orders(len(names))
    for done in range(rounds):
        if deadline is not None and done >= MIN_ROUNDS and clock() >= deadline:
            break
        for place in design[done % len(design)]:
            name = names[place]
            start = clock()
            steps[name]()
            samples[name].append(clock() - start)
        if after_round is not None:
            after_round()
    return samples


def rounds_for(step_seconds: float, repeats: int, floor_seconds: float, most: int = 50) -> int:
    """More rounds where one is short: enough to fill ``floor_seconds``, ``repeats`` to ``most``."""
    return max(repeats, min(most, int(floor_seconds / max(step_seconds, 1e-9))))


def summarize(samples: Sequence[float]) -> dict:
    """Median and quartiles in milliseconds, with every sample."""
    ms = [round(1e3 * s, 4) for s in samples]
    median = statistics.median(ms)
    quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [median] * 3
    return {
        "median_ms": round(median, 4),
        "q1_ms": round(quartiles[0], 4),
        "q3_ms": round(quartiles[2], 4),
        "min_ms": min(ms),
        "samples_ms": ms,
    }
