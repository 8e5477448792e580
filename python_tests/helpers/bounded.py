"""Calls in a process of their own that may take so much time and memory, and no more.

What hangs, crashes or fills the memory is then a failed test, not the end of the test run. Importing PyTorch takes a
process seconds, so one child makes many calls, one after the other, and reports each.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_START_UP = 120  # seconds for the imports of a child on a loaded machine
_BASE = 6 << 10  # MiB of address space that PyTorch reserves without using it


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``returncode`` is None if it was killed for taking too long; ``peak``: MiB resident."""

    returncode: int | None
    stdout: str
    stderr: str
    seconds: float
    peak: float


@dataclass(frozen=True)
class Called:
    """What a call returned (as a string) or raised, its seconds, and the MiB by which resident memory grew meanwhile
    (at most: a peak of an earlier call of the same process counts too).

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
        in_time, status, usage = False, 0, None
        while time.monotonic() - start < seconds:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if in_time := pid != 0:
                break
            time.sleep(0.02)
        if not in_time:
            os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # or subprocess would wait for it once more
        took = time.monotonic() - start
        out.seek(0)
        err.seek(0)
        return Ended(
            process.returncode if in_time else None,
            out.read().decode(errors="replace"),
            err.read().decode(errors="replace"),
            took,
            usage.ru_maxrss / 1024,
        )


def call_each(function: str, arguments: Sequence[str], seconds: float, megabytes: int) -> dict[str, Called]:
    """Call ``function`` ("package.module:name", importable as in a test) with each argument; by argument, what came of
    it.

    A call that takes longer than ``seconds`` or crashes ends its child; the next argument gets a new one.
    """
    results: dict[str, Called] = {}
    paths = os.pathsep.join([str(ROOT / "python_tests"), *filter(None, sys.path)])
    while len(results) < len(arguments):
        left = arguments[len(results) :]
        command = [sys.executable, __file__, function, str(seconds), *left]
        ended = run_bounded(
            command, _START_UP + seconds * len(left), megabytes, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        )
        lines = ended.stdout.splitlines()
        for argument, line in zip(left, (line for line in lines if line.startswith('{"value"')), strict=False):
            results[argument] = Called(**json.loads(line))
        if len(results) < len(arguments) and ended.returncode != 0:
            if "ready" not in lines:
                raise AssertionError(f"the child did not start: {ended}")
            argument = arguments[len(results)]
            results[argument] = Called(ended.stderr[-500:], "killed", ended.seconds, ended.peak)
    return results


def _resident() -> float:
    """MiB that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20)


def _child(function: str, seconds: float, arguments: Sequence[str]) -> None:
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    print("ready", flush=True)
    for argument in arguments:
        before, start = _resident(), time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process, in C code too
        try:
            value, error = str(call(argument)), None
        except Exception as caught:
            value, error = str(caught), type(caught).__name__
        signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.monotonic() - start
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        called = {"value": value[:5000], "error": error, "seconds": took, "growth": growth}
        print(json.dumps(called), flush=True)


if __name__ == "__main__":
    _child(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
