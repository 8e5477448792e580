"""Stopping between two steps on SIGINT or SIGTERM, and one run at a time in a folder."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a flag to be read between two steps.

    A second SIGINT raises KeyboardInterrupt at once. Off the main thread, where Python allows no
    signal handlers, the flag stays unset.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum


def ignore_signals(worker_id: int) -> None:
    """Initialise a data-loading process: only its parent decides when it ends.

    A signal to the whole process group would otherwise kill the workers while the parent still
    finishes its step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
