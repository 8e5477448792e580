import itertools
from collections import Counter

import pytest

from convnextv2_kernels.benchmark.timing import (
    Budget,
    Control,
    control_sentence,
    orders,
    rounds_for,
    summarize,
    time_interleaved,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def step(self, seconds):
        def run():
            self.now += seconds

        return run


def test_each_arm_gets_its_own_time():
    clock = Clock()
    steps = {"a": clock.step(1.0), "b": clock.step(2.0)}
    samples = time_interleaved(steps, 5, clock=clock)
    assert samples == {"a": [1.0] * 5, "b": [2.0] * 5}


def test_every_round_runs_each_once():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    time_interleaved(steps, 4)
    assert len(calls) == 12 and all(set(calls[i : i + 3]) == set("abc") for i in range(0, 12, 3))


@pytest.mark.parametrize("count", range(1, 9))
def test_each_follows_each_other_equally_often(count):
    rows = orders(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    pairs = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert len(pairs) == count * (count - 1) and len(set(pairs.values())) <= 1


def test_a_control_is_valid_within_three_percent():
    assert Control.from_samples("x", [1.0, 1.0, 1.0], [1.02, 1.029, 5.0]).valid
    off = Control.from_samples("x", [1.0] * 3, [1.04] * 3)
    assert not off.valid and off.to_json() == {"of": "x", "ratio": 1.04, "tolerance": 0.03, "valid": False}
    assert "INVALID: a copy of x took 1.040 times as long" in control_sentence(off.to_json())
    none = Control("x", None, "out of memory")
    assert not none.valid and control_sentence(none.to_json()) == "INVALID: no control, out of memory"
    assert control_sentence(Control("x", 0.99).to_json()) is None
    assert control_sentence(None) == "measured without a control"


@pytest.mark.parametrize(("deadline", "rounds"), [(0.0, 3), (4.5, 5), (100.0, 6)])
def test_deadline_ends_rounds_but_three_are_timed(deadline, rounds):
    clock = Clock()
    samples = time_interleaved({"a": clock.step(1.0)}, 6, deadline, clock)
    assert len(samples["a"]) == rounds


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 0, expected at least 1"):
        time_interleaved({}, 0)


def test_summary_keeps_every_sample():
    summary = summarize([0.004, 0.001, 0.003, 0.002, 0.010])
    assert summary["median_ms"] == 3.0
    assert (summary["q1_ms"], summary["q3_ms"], summary["min_ms"]) == (2.0, 4.0, 1.0)
    assert summary["samples_ms"] == [4.0, 1.0, 3.0, 2.0, 10.0]
    assert summarize([0.5])["q3_ms"] == 500.0


def test_short_rounds_are_repeated_more_often():
    assert rounds_for(0.01, repeats=5, floor_seconds=0.4) == 40
    assert rounds_for(1e-6, repeats=5, floor_seconds=0.4) == 50
    assert rounds_for(1.0, repeats=5, floor_seconds=0.4) == 5


def test_budget():
    ticks = itertools.count()
    budget = Budget(10, clock=lambda: float(next(ticks)))  # deadline 10
    part = budget.part(0.5)  # clock 1, then 2: half of 9 from there
    assert part.deadline == pytest.approx(6.5)
    assert not Budget(None).spent
    assert Budget(None).part(0.1).deadline is None
    clock = Clock()
    short = Budget(1, clock)
    assert not short.spent
    clock.now = 1.0
    assert short.spent
