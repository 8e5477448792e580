"""Whether the other processes of a run are alive, and how a process ends that waits for one that is not.

Each process writes a sign of life to torchrun's store once a second. The first one looks at those of all others and
publishes what it sees, the others look at the first one's. Where a process is silent, the others raise
:class:`PeerLost` the next time they wait for it in Python; where they wait inside PyTorch, in the exchange of
gradients, which nothing can interrupt, a thread saves what can be saved and ends the process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from .._interrupts import STOPPING
from ..errors import UserError
from .signals import StopRequest

TIMEOUT = 60.0  # without a sign of life
ANSWER = 10  # times that: how long a process that is alive may let others wait in an exchange
BEAT = 1.0
GRACE = 5.0  # for the main thread, to end by itself
RESCUE = 120.0  # to write the last checkpoint
_blocks = 0  # of this process that joined others, each with its own names in the store


class PeerLost(UserError):
    """Another process of the run has ended or does not answer."""


class Watch:
    """Threads that exchange signs of life with the other processes, and signals to stop.

    Args:
        rank, size: of this process, and of how many.
        timeout: seconds without a sign of life that mean that a process is lost.
    """

    def __init__(self, rank: int, size: int, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        self.lost: PeerLost | None = None
        self._training = 0  # how many began: a signal to stop is for one of them
        self._request: StopRequest | None = None
        self._rescue: Callable[[], str] = str
        self._peer_signum = 0
        self._told: int | None = None
        self._noticed = threading.Event()  # by the main thread, that a process is lost
        self._over = threading.Event()
        self._silent: list[int] = []  # as the first process sees it
        self._beats: dict[int, str] = {}
        self._previous_wakeup: int | None = None
        self._wakeup_read, self._wakeup_write = os.pipe()
        self._threads = [
            threading.Thread(target=work, name="peers", daemon=True) for work in (self._exchange, self._judge)
        ]
        self._store = _connect()
        self._publish(0)

    def start(self) -> None:
        """Begin, once all processes have constructed theirs. From the main thread, whose signals it hears."""
        for end in (self._wakeup_read, self._wakeup_write):
            os.set_blocking(end, False)
        if threading.current_thread() is threading.main_thread():
            self._previous_wakeup = signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say goodbye."""
        self._over.set()
        if self._previous_wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
        for thread in self._threads:
            thread.join(2)  # a store that is gone may not be waited for
        if not any(thread.is_alive() for thread in self._threads):
            for end in (self._wakeup_read, self._wakeup_write):
                os.close(end)

    def begin(self, request: StopRequest, rescue: Callable[[], str]) -> None:
        """Tell the others of signals in ``request`` from now on. ``rescue`` saves what this process can save alone, in
        another thread, and returns a sentence about it, or nothing."""
        self._request, self._rescue = request, rescue
        self._training += 1
        self._peer_signum = 0  # last: one of the training before may have come until now

    def signum(self) -> int | None:
        """A signal to stop the training, in this process or in any other; None without one."""
        own = self._request.signum if self._request is not None else None
        return own or self._peer_signum or None

    def check(self) -> None:
        """Raise :class:`PeerLost` where another process is lost. The main thread calls it while it waits."""
        if self.lost is not None:
            self._noticed.set()
            raise self.lost

    def give_up(self, error: PeerLost) -> None:
        """Note that the main thread itself found a process lost."""
        self.lost = self.lost or error
        self._noticed.set()

    def _publish(self, number: int) -> None:
        training, signum, silent = self._training, self.signum() or 0, ",".join(map(str, self._silent))
        self._store.set(f"beat/{self.rank}", f"{number};{training};{signum};{silent}")

    def _exchange(self) -> None:
        number = 0
        others = range(1, self.size) if self.rank == 0 else [0]
        while not self._over.wait(BEAT):
            number += 1
            try:
                self._publish(number)
                beats = self._store.multi_get([f"beat/{rank}" for rank in others])
            except Exception:
                return  # a store that is gone is a silence that the other thread judges
            for rank, beat in zip(others, (value.decode() for value in beats), strict=True):
                self._beats[rank] = beat
                _, training, signum, silent = beat.split(";")
                if int(training) == self._training:
                    self._peer_signum = self._peer_signum or int(signum)
                if silent and self.rank:
                    self._silent = [int(word) for word in silent.split(",")]
        if self.lost is None:
            with contextlib.suppress(Exception):
                self._store.set(f"beat/{self.rank}", "done;0;0;")

    def _judge(self) -> None:
        others = range(1, self.size) if self.rank == 0 else [0]
        seen: dict[int, str | None] = dict.fromkeys(others)
        ages, told_for, last = dict.fromkeys(others, 0.0), 0.0, time.monotonic()
        while not self._over.wait(0.25):
            now = time.monotonic()
            # A pause of this process (Ctrl-Z) is no silence of the others.
            passed, last = min(now - last, BEAT), now
            for rank in others:
                beat = self._beats.get(rank)
                done = beat is not None and beat.startswith("done")
                ages[rank] = 0.0 if done or beat != seen[rank] else ages[rank] + passed
                seen[rank] = beat
            if self._told is None:
                self._told = self._heard()
            told_for += passed if self._told is not None else 0.0
            silent = [rank for rank in others if ages[rank] > self.timeout]
            if silent or self._silent:
                self._silent = self._silent or silent
                self.lost = self.lost or PeerLost(self._sentence(self._silent, self.timeout))
            elif told_for > GRACE and (quiet := [rank for rank in others if ages[rank] > GRACE]):
                name = signal.Signals(self._told).name
                text = f"stopped by {name}, and {self._sentence(quiet, GRACE)}"
                self.lost = self.lost or PeerLost(text, 128 + self._told)
            if self.lost is not None:
                self._end(self.lost)
                return

    def _sentence(self, ranks: list[int], seconds: float) -> str:
        names = ", ".join(map(str, ranks))
        which = f"process {names}" if len(ranks) == 1 else f"processes {names}"
        through = " (or the store of torchrun)" if ranks == [0] else ""
        verb = "gives" if len(ranks) == 1 else "give"
        return f"{which} of {self.size}{through} {verb} no sign of life for {seconds:g} s."

    def _end(self, error: PeerLost) -> None:
        """End the process where the main thread does not."""
        if self._noticed.wait(GRACE) or self._over.is_set():
            return
        limit = threading.Timer(RESCUE, os._exit, [error.code])
        limit.daemon = True
        limit.start()
        try:
            saved = self._rescue()
        except Exception as reason:
            saved = f"the steps since the last checkpoint could not be saved ({reason})."
        if self._noticed.is_set() or self._over.is_set():  # the silent one is back, and the main thread ends
            limit.cancel()
            return
        say_and_exit(f"error: {error} {saved}".rstrip(), error.code)

    def _heard(self) -> int | None:
        """A signal to stop that came: Python's handlers wait while the main thread is inside PyTorch."""
        try:
            signums = os.read(self._wakeup_read, 64)
        except OSError:
            return None
        return next((signum for signum in signums if signum in STOPPING), None)


def _connect() -> dist.Store:
    """A connection of one's own to the store that the processes met at: calls on one connection wait for each other."""
    global _blocks
    _blocks += 1
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, None, False, timedelta(seconds=60))
    return dist.PrefixStore(f"peers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_blocks}", store)


def say_and_exit(text: str, code: int) -> None:
    """End the process at once: nothing in it may be waited for."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
    os._exit(code)


def exit_at_the_end(code: int) -> None:
    """Let the program end with ``code`` and not wait for threads of PyTorch that wait for a lost process."""

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    atexit.register(leave)
