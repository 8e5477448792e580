"""What the modes of the command line have in common: threads for a while, and errors as exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from .correctness import GateError
from .results import ResumeError


def exit_code(run: Callable[[], int], threads: int | None, refused: str | None, stopped: str = "stopped") -> int:
    """``run()`` under so many threads; its exit code, or 1 (correctness gate red), 2 (bad input), 130 (interrupted).

    Args:
        refused: why nothing is run at all, None if it is.
        stopped: what is said after an interruption.
    """
    if refused:
        print(refused, file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        return run()
    except ResumeError as error:
        print(error, file=sys.stderr)
        return 2
    except GateError as error:
        print(f"correctness gate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)
