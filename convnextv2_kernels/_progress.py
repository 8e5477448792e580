"""How far a long run is: a bar on a terminal, plain lines in a file. Needs rich."""

import sys
import time
from collections import deque
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.text import Text

from ._console import Output, styled, visible, visible_lines

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


class Screen(Console):
    """A console whose strings are plain text, in which control characters are escapes; writing never raises.

    Args:
        stderr: write to standard error, as they are now, instead of standard output.
        options: of the console.
    """

    def __init__(self, stderr: bool = False, **options: Any):
        file = styled(sys.stderr if stderr else sys.stdout)
        super().__init__(file=file, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """What rich makes of every string that is printed or in a table."""
        return super().render_str(visible_lines(text), **options)


class Progress:
    """Context manager that shows how much of ``total`` units of work is done.

    On a terminal that is a bar; elsewhere a line every 10 s. With ``percent`` the units are too fine to be read (bytes,
    parameters): the bar shows a share and vanishes at the end, and elsewhere only :meth:`log` writes lines.

    Args:
        done: units done already, when the work is resumed.
        title: what the units are; a name in it may hold anything.
        console: where to write; standard output by default.
        quiet: show nothing, as all processes of a run but the first do.
    """

    def __init__(
        self,
        title: str,
        total: float,
        done: float = 0,
        console: Screen | None = None,
        quiet: bool = False,
        percent: bool = False,
    ):
        self.title, self.total, self.done, self.percent = visible(title), total, done, percent
        self.console = console or Screen(soft_wrap=True, quiet=quiet)
        self.detail = ""
        self._began = self._printed_at = time.monotonic()
        self._history = deque([(self._began, done)], maxlen=50)
        self._printed = done
        self._bar = None
        if self.console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}", markup=False),
                bars.BarColumn(),
                bars.TaskProgressColumn() if percent else bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[detail]}", markup=False),
                console=self.console,
                transient=percent,
                redirect_stderr=styled(sys.stderr).isatty(),
            )
            self._task = self._bar.add_task(self.title, total=total, completed=done, detail="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            # These print above the bar, until it stops and puts the former ones back.
            sys.stdout, sys.stderr = (
                Output(stream) if isinstance(stream, FileProxy) else stream for stream in (sys.stdout, sys.stderr)
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._printed != self.done and not self.percent:
            self._print()

    def rate(self) -> float:
        """Return units per second over the last updates."""
        (t0, d0), (t1, d1) = self._history[0], self._history[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 else 0.0

    def update(self, done: float, total: float | None = None, detail: str = "") -> None:
        """Report ``done`` units in all, of a ``total`` that may have become known only now."""
        now = time.monotonic()
        self._history.append((now, done))
        self.done, self.detail = done, visible(detail)
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, detail=self._suffix())
        elif now - self._printed_at >= PLAIN_INTERVAL and not self.percent:
            self._print()

    def advance(self, units: float) -> None:
        """Report ``units`` more."""
        self.update(self.done + units, detail=self.detail)

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self.console.print(text)

    def log(self, text: str) -> None:
        """:meth:`note` with the seconds since the start before it."""
        self.note(f"[{time.monotonic() - self._began:6.1f} s] {text}")

    def _suffix(self) -> str:
        rate = self.rate()
        left = format_seconds((self.total - self.done) / rate) + " left" if rate > 0 else ""
        return "  ".join(part for part in (self.detail, left) if part)

    def _print(self) -> None:
        self._printed_at, self._printed = time.monotonic(), self.done
        self.note(f"{self.title} {self.done}/{self.total}  {self._suffix()}")
