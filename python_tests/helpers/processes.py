"""Processes that a test starts, interrupts and waits for. They are forked, so that none has to import PyTorch again."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Forked:
    """A call in a process and a session of its own, whose exit code is what it returns, 99 after an exception; what it
    prints goes to a file."""

    def __init__(self, log: Path, call: Callable[..., Any], *args: Any):
        self.log = log
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(call, *args))
        self._process.start()
        self.pid = self._process.pid

    def _run(self, call: Callable[..., Any], *args: Any) -> None:
        os.setsid()
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(handle, stream)
        # pytest's own would keep the text
        sys.stdout = sys.stderr = os.fdopen(os.dup(handle), "w", buffering=1)
        try:
            code = call(*args) or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)

    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signum)

    def wait(self, seconds: float = 30) -> int:
        """The exit code, negative for a signal; fails where the process does not end in time."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}")
        return self._process.exitcode

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def wait_until(condition: Callable[[], Any], seconds: float = 30, what: str = "") -> Any:
    """Return what ``condition`` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or condition}"
        time.sleep(0.01)
    return value


def children(pid: int) -> list[int]:
    """The processes that a process started, on Linux."""
    return [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
