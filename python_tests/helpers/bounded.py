"""Calls in a process of their own that may take so much time and memory, and no more.

What hangs, crashes or fills the memory is then a failed test, not the end of the test run. Importing PyTorch takes a
process seconds, so one child imports it and makes each call in a fork of itself.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_START_UP = 120  # seconds for the imports of a child on a loaded machine
_BASE = 6 << 10  # MiB of address space that PyTorch reserves without using it


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``returncode`` is None if it was killed for taking too long."""

    returncode: int | None
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Called:
    """What a call returned (as a string) or raised, its seconds, and the MiB by which resident memory grew meanwhile.

    ``error`` is the name of the exception's class. A call that ended its process, or took longer than it may, has the
    error "killed".
    """

    value: str
    error: str | None
    seconds: float
    growth: float


def run_bounded(
    command: Sequence[str],
    seconds: float,
    megabytes: int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Run a command with an end after ``seconds`` and address space for ``megabytes`` beyond PyTorch's own."""
    limit = (_BASE + megabytes) << 20
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        try:
            process.wait(seconds)
            in_time = True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            in_time = False
        took = time.monotonic() - start
        out.seek(0)
        err.seek(0)
        return Ended(
            process.returncode if in_time else None,
            out.read().decode(errors="replace"),
            err.read().decode(errors="replace"),
            took,
        )


def call_each(function: str, arguments: Sequence[str], seconds: float, megabytes: int) -> dict[str, Called]:
    """Call ``function`` ("package.module:name", importable as in a test) with each argument; by argument, what came of
    it.

    Each call has a process, which is killed after ``seconds`` and has address space for ``megabytes`` beyond PyTorch's
    own.
    """
    paths = os.pathsep.join([str(ROOT / "python_tests"), *filter(None, sys.path)])
    ended = run_bounded(
        [sys.executable, __file__, function, str(seconds), *arguments],
        _START_UP + 2 * seconds * len(arguments),
        megabytes,
        {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    results = [Called(**json.loads(line)) for line in ended.stdout.splitlines() if line.startswith('{"value"')]
    if ended.returncode != 0 or len(results) != len(arguments):
        raise AssertionError(f"the process that makes the calls failed: {ended}")
    return dict(zip(arguments, results, strict=True))


def _call_in_fork(call: Callable[[str], object], argument: str, seconds: float) -> Called:
    reading, writing = os.pipe()
    start = time.monotonic()
    if (child := os.fork()) == 0:
        # not of the parent: a fork begins without the pages of libraries
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        os.write(writing, f"{pages * resource.getpagesize()}\n".encode())
        try:
            value, error = str(call(argument)), None
        except Exception as caught:
            value, error = str(caught), type(caught).__name__
        os.write(writing, json.dumps([value[:5000], error]).encode())  # less than a pipe holds
        os._exit(0)
    os.close(writing)
    killed = False
    while (ended := os.wait4(child, os.WNOHANG))[0] == 0:
        if not killed and time.monotonic() - start > seconds:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.005)
    took = time.monotonic() - start
    with os.fdopen(reading) as answer:
        before, said = int(answer.readline()), answer.read()
    growth = ended[2].ru_maxrss / 1024 - before / (1 << 20)
    value, error = json.loads(said) if said else (f"status {ended[1]}", "killed")
    return Called(value, error, took, growth)


def _child(function: str, seconds: float, arguments: Sequence[str]) -> None:
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    for argument in arguments:
        print(json.dumps(asdict(_call_in_fork(call, argument, seconds))), flush=True)


if __name__ == "__main__":
    _child(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
