"""The short selection and the rest are all tests, each once; the sample has what it promises."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.selection import MEET, cover

CONFTEST = """
import pytest
from helpers import selection


def pytest_addoption(parser):
    selection.add_options(parser)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    selection.select(config, items)
"""
TESTS = """
from typing import NamedTuple
import pytest


class Backend(NamedTuple):
    name: str
    interpreted: bool = False


def backends(*names):
    found = [Backend(n, n == "slow") for n in names]
    return pytest.mark.parametrize("backend", found, ids=lambda b: b.name)


@backends("quick", "slow")
@pytest.mark.parametrize("op", "abc")
@pytest.mark.parametrize("side", (1, 2, 3, 4))
@pytest.mark.parametrize("kernel", (3, 5))
def test_product(backend, op, side, kernel):
    pass


@backends("quick")
@pytest.mark.meet("side", "kernel")
@pytest.mark.parametrize("side", (1, 2, 3, 4))
@pytest.mark.parametrize("kernel", (3, 5))
@pytest.mark.parametrize("case", [{"width": 1}, {"width": 2}], ids=str)
def test_asked_for(backend, side, kernel, case):
    pass


@pytest.mark.parametrize("side", (1, 2, 3, 4))
@pytest.mark.parametrize("kernel", (3, 5))
def test_of_no_op(side, kernel):
    pass


@pytest.mark.thorough
def test_deep():
    pass


@pytest.mark.thorough("slow")
@backends("quick", "slow")
def test_deep_on_one(backend):
    pass
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> dict[str, list[str]]:
    """Names of the tests of each selection."""
    folder = tmp_path_factory.mktemp("selection")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_made_up.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  thorough\n  meet\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def collect(selection: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--selection={selection}"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]

    return {selection: collect(selection) for selection in ("all", "short", "rest")}


def test_short_and_rest_are_all_of_them_once(collected):
    assert sorted(collected["short"] + collected["rest"]) == sorted(collected["all"])
    assert len(set(collected["all"])) == len(collected["all"]) == 48 + 16 + 8 + 1 + 2


def cases(names: list[str], test: str) -> list[list[str]]:
    return [name[len(test) + 1 : -1].split("-") for name in names if name.startswith(f"{test}[")]


def test_every_two_values_meet_where_one_is_of_an_op_or_a_backend(collected):
    chosen, every = (
        {tuple(case) for case in cases(collected[selection], "test_product")} for selection in ("short", "all")
    )
    assert len(chosen) < len(every) / 2

    def met(found, backend, *positions):
        return {tuple(case[p] for p in positions) for case in found if backend in case}

    # ids are in the order kernel, side, op, backend
    for pair in ((2, 1), (2, 0)):
        assert met(chosen, "quick", *pair) == met(every, "quick", *pair)
    for position in range(4):
        assert met(chosen, "slow", position) == met(every, "slow", position)
    # where a call takes a second each op and each side is enough
    assert len([case for case in chosen if "slow" in case]) == 4 < len([case for case in chosen if "quick" in case])


def test_what_a_test_asks_for_meets_and_entries_of_a_dict_count(collected):
    found = cases(collected["short"], "test_asked_for")
    assert {(kernel, side) for _, kernel, side, _ in found} == set(itertools.product("35", "1234"))
    assert {case for case, *_ in found} == {"{'width': 1}", "{'width': 2}"} and len(found) == 8


def test_all_cases_of_a_test_without_ops_and_backends_are_kept(collected):
    assert len(cases(collected["short"], "test_of_no_op")) == 8


def test_thorough_tests_are_left_out(collected):
    assert "test_deep" in collected["rest"] and "test_deep_on_one[slow]" in collected["rest"]
    assert "test_deep_on_one[quick]" in collected["short"]


def test_a_cover_has_everything_and_no_case_twice():
    grid = [[(i, x) for i, x in enumerate(case)] for case in itertools.product(range(4), range(3), range(2))]
    taken = cover(grid)
    assert {item for i in taken for item in grid[i]} == set(itertools.chain.from_iterable(grid))
    assert len(taken) == 4 and taken == sorted(set(taken)) and cover(grid) == taken
    assert cover([]) == [] and set(MEET) >= {"backend", "op", "dtype"}
