"""Signals outside of training: a command that is told to stop ends with one word and the exit code 128 + signal.

While the package is imported for ``python -m convnextv2_kernels`` nothing is worth an exception; later one is raised,
so that what is half-done can be put in order.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a user, a batch system, a terminal that closes and a machine that goes down send; Windows knows two of them.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """A signal other than SIGINT told the command to stop; ``code`` is its exit code."""

    def __init__(self, signum: int):
        super().__init__("terminated")
        self.code = 128 + signum


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, and :class:`Terminated` on the other signals that stop a program; a second one
    ends the process at once. What is ignored, as SIGHUP under nohup, stays ignored. Off the main thread, do nothing."""
    told = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            _end(signum)
        told = True
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)

    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    previous[signum] = signal.signal(signum, handle)
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def leave(code: int) -> int:
    """Return the exit code of a command; after a signal, end with it, and wait for no thread that waits for a file."""
    if code > 128:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _end(signum: int, frame: FrameType | None = None) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n" if signum == signal.SIGINT else b"terminated\n")
    os._exit(128 + signum)


def _is_started() -> bool:
    """Whether Python imports this package to run it as ``python -m``: the name is known, its file not yet."""
    words = sys.orig_argv
    named = (words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m")
    return sys.argv[:1] == ["-m"] and __package__ in named


if _is_started() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
