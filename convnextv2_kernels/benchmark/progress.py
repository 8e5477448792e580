"""Where a long run stands: a bar on a terminal, lines with the time elsewhere."""

from __future__ import annotations

import time

from rich import progress as bars
from rich.console import Console


class Progress:
    """Context manager of a bar over ``total`` units of work, on standard error.

    ``log(message)`` says what is being done, ``advance(units)`` that some of it is done. Without a terminal each
    message is a line, with the seconds since the start.
    """

    def __init__(self, console: Console, title: str, total: float) -> None:
        self._console, self._began = console, time.perf_counter()
        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._bar = bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self._bar.stop()

    def advance(self, units: float) -> None:
        """Some work is done."""
        self._bar.advance(self._task, units)

    def log(self, message: str) -> None:
        """What comes next."""
        self._console.print(f"[{time.perf_counter() - self._began:6.1f} s] {message}", markup=False)
