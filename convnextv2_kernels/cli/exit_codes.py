"""The exit codes of all commands, and how an exception becomes one.

A command returns :data:`OK`, or raises :class:`~convnextv2_kernels.errors.UserError`; :func:`exit_code` does the rest.
Only the standard library is imported here.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from .._console import Destination, printing_is_optional, protected_streams
from ..errors import UserError, describe_os_error, is_of_the_machine

__all__ = [
    "BROKEN_PIPE",
    "FAILURE",
    "INTERRUPTED",
    "OK",
    "USAGE",
    "UserError",
    "exit_code",
    "printing_is_optional",
    "require_packages",
    "user_errors",
]

OK = 0
FAILURE = 1  # the command could not be carried out, or found what it looks for, such as a wrong result
USAGE = 2  # the request itself is wrong: an option, or a file that does not go with it (argparse exits with 2 as well)
INTERRUPTED = 130  # 128 + SIGINT; another signal: 128 + its number
BROKEN_PIPE = 141  # 128 + SIGPIPE, as other programs in a pipeline; only where printing was all there was to do

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

    ``command`` is what the user called, such as "analyze knn". Under torchrun only the first process speaks. Printing
    never raises meanwhile; text that could not be written is a failure unless ``run`` called
    :func:`printing_is_optional`.
    """
    with protected_streams() as output:
        try:
            code = _run(run, command)
        except SystemExit as end:  # argparse's, after --help or a usage error
            if end.code or output.destination.lost is None:
                raise
            code = OK
        return _after_printing(output.destination, code)


def _run(run: Callable[[], int], command: str) -> int:
    try:
        return run()
    except UserError as error:
        _say(f"error: {error}")
        return error.code
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        _say(f"error: {command} needs {package}: pip install {package}")
        return FAILURE
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted")
        return getattr(stop, "code", INTERRUPTED)
    except OSError as error:
        if not is_of_the_machine(error):
            raise
        _say(f"error: {command}: {describe_os_error(error)}")
        return FAILURE


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr)


def _after_printing(destination: Destination, code: int) -> int:
    """The exit code of a command that wanted to return ``code``, and whose output may have been lost."""
    error, optional = destination.lost, destination.optional
    if error is None:
        return code
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE if code == OK and not optional else code
    if error.errno == errno.EBADF and optional:
        return code  # closed by whoever started this
    reason = f"standard output: {describe_os_error(error)}"
    _say(f"note: some output could not be written; {reason}" if optional else f"error: {reason}")
    destination.lost = None  # said once, where one command calls another
    return code if optional else code or FAILURE


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds, whose messages are sentences already, into :class:`UserError`."""
    try:
        yield
    except kinds as error:
        if not isinstance(error, OSError):
            raise UserError(str(error)) from error
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(describe_os_error(error)) from error


def require_packages(command: str, modules: Sequence[str]) -> None:
    """Raise UserError, naming all at once, where some of ``modules`` (keys of :data:`PACKAGES`) are not installed."""
    missing = [PACKAGES[module] for module in modules if find_spec(module) is None]
    if missing:
        *first, last = missing
        names = f"{', '.join(first)} and {last}" if first else last
        raise UserError(f"{command} needs {names}: pip install {' '.join(missing)}")
