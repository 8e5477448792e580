"""Covering sets: a few cases that contain every pair of values of any two axes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from functools import partial


def pairwise(axes: Mapping[str, Sequence]) -> list[dict]:
    """Cases ``{axis: value}`` with every pair of values of every two axes, found greedily; the same each time."""
    names = list(axes)
    counts = [len(axes[name]) for name in names]
    shuffle = random.Random(0)
    # a case is {axis number: value number}; an item of it is (axis number, value number)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(counts[a])
        for j in range(counts[b])
    }
    cases = []
    while missing:
        case = dict(min(missing))
        rest = [axis for axis in range(len(names)) if axis not in case]
        shuffle.shuffle(rest)
        for axis in rest:
            values = list(range(counts[axis]))
            shuffle.shuffle(values)
            case[axis] = max(values, key=partial(_gain, missing, case, axis))
        missing -= {tuple(sorted(pair)) for pair in itertools.combinations(case.items(), 2)}
        cases.append({name: axes[name][case[axis]] for axis, name in enumerate(names)})
    return cases


def _gain(missing: set, case: dict[int, int], axis: int, value: int) -> int:
    """The number of missing pairs that a value of another axis would add to a case."""
    return sum(tuple(sorted(((axis, value), item))) in missing for item in case.items())
