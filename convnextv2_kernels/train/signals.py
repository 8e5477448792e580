"""Stopping between two steps on a signal, loaders that end with their run, and one run at a time in a folder."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .._interrupts import STOPPING
from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PARENT_DEATH = 1  # PR_SET_PDEATHSIG


class Stopped(Exception):
    """What cannot be finished because a signal told some process to stop."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopRequest:
    """Context manager that turns SIGINT, SIGTERM, SIGHUP and SIGUSR1 into a flag to be read between two steps.

    A second SIGINT raises KeyboardInterrupt at once. SIGHUP stays ignored where it is, as under nohup. Off the main
    thread, where Python allows no signal handlers, the flag stays unset.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                if not (signum == getattr(signal, "SIGHUP", None) and signal.getsignal(signum) is signal.SIG_IGN):
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


def start_loader(worker_id: int) -> None:
    """Initialise a data-loading process: only its parent decides when it ends, and it ends with its parent.

    A signal to the whole process group would otherwise kill the loaders while the parent still finishes its step; and
    a loader that waits for a file, or is stopped, would outlive a parent that was killed.
    """
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; raise UserError where another run holds it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            # A record lock, unlike flock, is not shared with forked data-loading workers, which
            # outlive a killed parent by some seconds.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder}: another run is writing to this folder.") from None
        except OSError:
            pass  # Some network file systems know no locks; the lock is a courtesy.
        yield
    finally:
        os.close(handle)
