"""Work on many files in threads that no hung file system can turn into a program that does not end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from .._console import visible
from ..errors import UserError

AHEAD = 64  # items handed to the threads before their results are wanted
PATIENCE = 300.0  # seconds for one file; the largest image that is read takes a few

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, patience: float = PATIENCE
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield each item, in order, with what ``work`` returned for it, or the exception that it raised.

    The threads are daemons: a signal is obeyed while one of them waits for a file that never comes, and so is the end
    of the program. Raises UserError where an item takes longer than ``patience`` seconds.
    """
    tasks: SimpleQueue[tuple[Future, Any] | None] = SimpleQueue()
    pool = [Thread(target=_serve, args=(work, tasks), daemon=True) for _ in range(max(1, threads))]
    waiting: deque[tuple[Item, Future]] = deque()
    for thread in pool:
        thread.start()
    try:
        for item in items:
            future: Future = Future()
            waiting.append((item, future))
            tasks.put((future, item))
            if len(waiting) >= AHEAD:
                yield _outcome(*waiting.popleft(), patience)
        while waiting:
            yield _outcome(*waiting.popleft(), patience)
    finally:
        for _, future in waiting:
            future.cancel()
        for _ in pool:
            tasks.put(None)


def _serve(work: Callable[[Any], Any], tasks: SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, item = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(item))
            except Exception as error:
                future.set_exception(error)


def _outcome(item: Item, future: Future, patience: float) -> tuple[Item, Any]:
    if not wait([future], timeout=patience).done:
        raise UserError(
            f"{visible(str(item))}: reading it has not returned for {patience:g} s; is the storage still there?"
        )
    return item, future.exception() or future.result()
