"""Progress on a terminal (a bar) or in a file (a plain line now and then)."""

import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_INTERVAL = 10.0


def format_seconds(seconds: float) -> str:
    """Return a duration as 45s, 3m05s or 2h07m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 file, 2 files."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Reporter:
    """Show how far a task of ``total`` units is: a bar on a terminal, else a line every 10 s.

    ``update`` takes the units done and a text of the moment; ``note`` prints a line that stays. With ``quiet`` nothing
    is shown: only one process of a run reports.
    """

    def __init__(self, title: str, total: int, done: int = 0, console: Console | None = None, quiet: bool = False):
        self.title, self.total, self.done = title, total, done
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False, quiet=quiet)
        self.detail = ""
        self._history = deque([(time.monotonic(), done)], maxlen=50)
        self._printed_at = time.monotonic()
        self._printed = done
        self._bar = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self.console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, detail="")

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._printed != self.done:
            self._print()

    def rate(self) -> float:
        """Return units per second over the last updates."""
        (t0, d0), (t1, d1) = self._history[0], self._history[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 else 0.0

    def update(self, done: int, detail: str = "") -> None:
        """Report ``done`` units."""
        now = time.monotonic()
        self._history.append((now, done))
        self.done, self.detail = done, detail
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=self._suffix())
        elif now - self._printed_at >= PLAIN_INTERVAL:
            self._print()

    def advance(self, done: int, total: int) -> None:
        """Report ``done`` of a total that may have become known only now."""
        if total != self.total:
            self.total = total
            if self._bar is not None:
                self._bar.update(self._task, total=total)
        self.update(done)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def _suffix(self) -> str:
        rate = self.rate()
        left = format_seconds((self.total - self.done) / rate) + " left" if rate > 0 else ""
        return "  ".join(part for part in (self.detail, left) if part)

    def _print(self) -> None:
        self._printed_at, self._printed = time.monotonic(), self.done
        self.note(f"{self.title} {self.done}/{self.total}  {self._suffix()}")
