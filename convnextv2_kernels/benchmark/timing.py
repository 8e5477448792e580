"""Interleaved timing: drift of the machine falls on every arm alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

MIN_ROUNDS = 3


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    deadline: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, by arm: every round runs each arm once.

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
    for done in range(rounds):
        if deadline is not None and done >= MIN_ROUNDS and clock() >= deadline:
            break
        # Rotated, so that no arm always inherits the cache and the heap of the same neighbour.
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
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
