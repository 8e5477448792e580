"""The exit codes of all commands, and how an exception becomes one.

A command returns :data:`OK`, or raises :class:`~convnextv2_kernels.errors.UserError`; :func:`exit_code` does the rest.
Only the standard library is imported here.
"""

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from ..errors import UserError

__all__ = [
    "BROKEN_PIPE",
    "FAILURE",
    "INTERRUPTED",
    "OK",
    "USAGE",
    "UserError",
    "exit_code",
    "require_packages",
    "user_errors",
]

OK = 0
FAILURE = 1  # the command could not be carried out, or found what it looks for, such as a wrong result
USAGE = 2  # the request itself is wrong: an option, or a file that does not go with it (argparse exits with 2 as well)
INTERRUPTED = 130  # 128 + SIGINT; another signal: 128 + its number
BROKEN_PIPE = 141  # 128 + SIGPIPE, as other programs in a pipeline

# Modules that some commands import and the kernels do not need, and the package that brings each.
PACKAGES = {
    "PIL": "Pillow",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "rich": "rich",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def exit_code(run: Callable[[], int], command: str) -> int:
    """Call ``run``; return its exit code, or the one of the exception it raised, whose sentence goes to standard error.

    ``command`` is what the user called, such as "analyze knn". Under torchrun only the first process speaks.
    """

    def say(text: str) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            print(text, file=sys.stderr)

    try:
        try:
            return run()
        finally:
            sys.stdout.flush()  # here, where a broken pipe can be caught, not when the interpreter ends
    except UserError as error:
        say(f"error: {error}")
        return error.code
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        say(f"error: {command} needs {package}: pip install {package}")
        return FAILURE
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted")
        return getattr(stop, "code", INTERRUPTED)
    except BrokenPipeError:
        if _has_reader(sys.stdout.fileno()):
            raise
        # What is still buffered has nowhere to go; without this the interpreter would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds, whose messages are sentences already, into :class:`UserError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        raise UserError(str(error)) from error


def require_packages(command: str, modules: Sequence[str]) -> None:
    """Raise UserError, naming all at once, where some of ``modules`` (keys of :data:`PACKAGES`) are not installed."""
    missing = [PACKAGES[module] for module in modules if find_spec(module) is None]
    if missing:
        *first, last = missing
        names = f"{', '.join(first)} and {last}" if first else last
        raise UserError(f"{command} needs {names}: pip install {' '.join(missing)}")


def _has_reader(descriptor: int) -> bool:
    """Whether a pipe is still read; False where the system cannot tell."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
