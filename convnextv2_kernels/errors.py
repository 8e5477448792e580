"""Exceptions whose text is meant for a person, and other exceptions in a few words."""

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
