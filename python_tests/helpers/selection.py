"""Which tests run: all of them, a covering sample (`make test`), or what the sample leaves out.

``pytest --selection=short`` keeps a few cases of every parametrised test and leaves out what is marked ``thorough``;
``--selection=rest`` is exactly what ``short`` leaves out. Both are functions of the collected tests, the same in every
run and every worker.

Of a test that has an argument of ``MEET``, the kept cases have every value of every argument, and every two values
that meet in some case where one of the two arguments is in ``MEET``: each op with each backend, each dtype, each
layout. Of other tests all cases are kept. An argument that is a dict, as the axes of ``conformance/test_values.py``
are, counts as one argument an entry. Where kernels are interpreted, and a call takes a second, both arguments have to
be in ``MEET``.

Marks of a test:

* ``thorough``: not in the short selection; ``thorough("triton")``: not its cases on that backend.
* ``meet("at", "k")``: every pair of values of these arguments is kept too; ``meet()``: every case.
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
        help="all tests (default), short: a covering sample, or rest: what the sample leaves out",
    )


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what the option leaves out."""
    selection = config.getoption("--selection")
    if selection == ALL:
        return
    short = sample(items)
    left_out = [item for item in items if (item in short) != (selection == SHORT)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if (item in short) == (selection == SHORT)]


def sample(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The tests of the short selection."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not is_thorough(item):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {cases[i] for cases in functions.values() for i in chosen(cases)}


def is_thorough(item: pytest.Item) -> bool:
    backend = getattr(axes_of(item).get("backend"), "name", None)
    return any(not mark.args or backend in mark.args for mark in item.iter_markers("thorough"))


def chosen(cases: Sequence[pytest.Item]) -> list[int]:
    """Numbers of the cases of one test that its sample has."""
    asked = [frozenset(mark.args) for mark in cases[0].iter_markers("meet")]
    axes = [axes_of(case) for case in cases]
    if frozenset() in asked or not set(MEET) & axes[0].keys():
        return list(range(len(cases)))
    return cover([list(meetings(found, asked)) for found in axes])


def axes_of(item: pytest.Item) -> dict[str, Hashable]:
    """Arguments of a case by name, those of a dict one by one."""
    callspec = getattr(item, "callspec", None)
    axes: dict[str, Hashable] = {}
    for name, value in (callspec.params if callspec else {}).items():
        entries = value if isinstance(value, dict) else {name: value}
        axes |= {key: entry if _hashable(entry) else repr(entry) for key, entry in entries.items()}
    return axes


def meetings(axes: dict[str, Hashable], asked: Sequence[frozenset[str]]) -> Iterable[Hashable]:
    """What one case has of what a sample has to have."""
    enough = all if getattr(axes.get("backend"), "interpreted", False) else any
    backend = axes.get("backend")
    for axis, value in axes.items():
        yield backend, axis, value
    for (a, x), (b, y) in itertools.combinations(sorted(axes.items(), key=lambda item: item[0]), 2):
        if enough(axis in MEET for axis in (a, b)) or any({a, b} <= pair for pair in asked):
            yield backend, a, x, b, y


def cover(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """Numbers of few cases that together have what all have, in order; greedy, the first of equals."""
    missing = set(itertools.chain.from_iterable(cases))
    # what a case adds only shrinks, so one that is still the best after an update is the best
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
