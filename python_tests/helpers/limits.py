"""Time limits: what hangs fails, and does not hang the tests."""

import threading
from collections.abc import Callable
from typing import Any


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of ``work``, or the exception it raised, either within ``seconds``."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"no answer within {seconds} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
