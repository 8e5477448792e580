"""The C library's allocator: what is held, and what is said about it."""

import json
import subprocess
import sys

import pytest

from convnextv2_kernels.benchmark import allocator

SCRIPT = """
import json
from convnextv2_kernels.benchmark import allocator
print(json.dumps([allocator.hold(mode) for mode in ("default", "constant")]))
try:
    allocator.hold("default")
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(allocator._library() is None, reason="not glibc")
def test_large_blocks_stay_once_the_allocator_is_held():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    found, refused = done.stdout.splitlines()
    default, constant = json.loads(found)
    assert (default["mode"], constant["mode"]) == ("default", "constant")
    assert constant["large_blocks"] == "kept" and allocator.sentence(constant) is None
    if not default["environment"]:
        assert default["large_blocks"] == "returned"
        assert "on one side only" in allocator.sentence(default)
    assert "already holds it constant" in refused


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="allocator is 'jemalloc', expected one of constant, default"):
        allocator.hold("jemalloc")


def test_an_allocator_that_could_not_be_held_is_named():
    found = {"mode": "constant", "library": "musl", "large_blocks": "unknown", "environment": {}}
    assert "could not be held constant" in allocator.sentence(found)
