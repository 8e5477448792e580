"""Exceptions whose text is meant for a person, and other exceptions in a few words."""

import errno
import os
import textwrap


class UserError(Exception):
    """A request that cannot be carried out: one sentence that says why and what to do.

    The command line prints the sentence alone, without a traceback, and exits with ``code`` (see
    :mod:`convnextv2_kernels.cli.exit_codes`).
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.code)


class FileError(ValueError):
    """A file that is not read: one sentence that names it and says why."""


def describe_error(error: Exception) -> str:
    """Return an exception as one short line."""
    text = textwrap.shorten(str(error), 200, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# What a file system, a device or a limit of the machine answers to a correct request.
_OF_THE_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        "EDQUOT EFBIG EIO EMFILE ENFILE ENODEV ENOMEM ENOSPC ENOTCONN ENXIO EROFS ESTALE ETIMEDOUT ETXTBSY EREMOTEIO"
    ).split()
    if hasattr(errno, name)
)


def is_of_the_machine(error: OSError) -> bool:
    """Whether an error tells of a file, a disk or a limit, and not of a bug: it names a file, or its number says so."""
    return error.errno is not None and (error.filename is not None or error.errno in _OF_THE_MACHINE)


def describe_os_error(error: OSError) -> str:
    """Return ``file: reason`` as far as the error knows them; without an errno, its own text."""
    if error.errno is None:
        return str(error)
    reason = error.strerror or os.strerror(error.errno)
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes, os.PathLike))]
    return f"{' to '.join(names)}: {reason}" if names else reason
