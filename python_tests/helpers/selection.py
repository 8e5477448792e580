"""Which tests run: all of them, a covering sample (`make test`), or what the sample leaves out.

``pytest --selection short`` keeps of every parametrised test a few cases in which the same values meet, and leaves out
what is marked ``thorough``. ``--selection rest`` is exactly what ``short`` leaves out. Both are functions of the tests
that were collected, the same each time and in every worker.

A sample has every value of every argument, and each two values that meet in some case where one of the two arguments
is an axis of MEET: each op with each backend, each dtype, each layout. An argument that is a dict, as the axes of
``conformance/test_values.py`` are, counts as one argument an entry. A test may ask for more: ``@pytest.mark.meet("at",
"k")`` has every pair of values of these two arguments too, and ``@pytest.mark.meet()`` every case.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Sequence

import pytest

ALL, SHORT, REST = SELECTIONS = ("all", "short", "rest")
# the axes along which kernels are written: a bug is of an op, on a backend, in a dtype
MEET = ("backend", "op", "name", "dtype")


def add_options(parser: pytest.Parser) -> None:
    parser.addoption(
        "--selection",
        choices=SELECTIONS,
        default=ALL,
        help="all tests (default), a covering sample of them, or the rest: what the sample leaves out",
    )


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what the option leaves out."""
    selection = config.getoption("--selection")
    if selection == ALL:
        return
    short = sample(items)
    wanted = [(item in short) == (selection == SHORT) for item in items]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, wanted, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, wanted, strict=True) if keep]


def sample(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The tests of the short selection."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thorough") is None:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {cases[i] for cases in functions.values() for i in chosen(cases)}


def chosen(cases: Sequence[pytest.Item]) -> list[int]:
    """Numbers of the cases of one test that its sample has."""
    marks = [mark.args for mark in cases[0].iter_markers("meet")]
    axes = [axes_of(case) for case in cases]
    if () in marks or any(not a for a in axes):
        return list(range(len(cases)))
    pairs = {frozenset(mark) for mark in marks}
    return cover([list(meetings(a, pairs)) for a in axes])


def axes_of(item: pytest.Item) -> dict[str, Hashable]:
    """Arguments of a case by name, those of a dict one by one."""
    callspec = getattr(item, "callspec", None)
    axes: dict[str, Hashable] = {}
    for name, value in (callspec.params if callspec else {}).items():
        entries = value if isinstance(value, dict) else {name: value}
        axes |= {key: entry if _hashable(entry) else repr(entry) for key, entry in entries.items()}
    return axes


def meetings(axes: dict[str, Hashable], pairs: set[frozenset[str]]) -> Iterable[Hashable]:
    """What one case has of what a sample has to have."""
    yield from axes.items()
    for (a, x), (b, y) in itertools.combinations(sorted(axes.items(), key=lambda item: item[0]), 2):
        if a in MEET or b in MEET or {a, b} in pairs:
            yield a, x, b, y


def cover(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """Numbers of few cases that together have what all have, in order; greedy, and the first of equals."""
    missing = set(itertools.chain.from_iterable(cases))
    # what a case adds only shrinks, so a number that is still the largest after an update is right
    queue = [(-len(set(case)), i) for i, case in enumerate(cases)]
    heapq.heapify(queue)
    taken = []
    while missing:
        _, i = heapq.heappop(queue)
        adds = len(missing.intersection(cases[i]))
        if queue and (-adds, i) > queue[0]:
            heapq.heappush(queue, (-adds, i))
            continue
        missing.difference_update(cases[i])
        taken.append(i)
    return sorted(taken)


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
