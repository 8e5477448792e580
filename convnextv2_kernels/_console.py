"""Text for people: names from outside are escaped, and printing never raises."""

import errno
import io
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

PATIENCE = 5.0  # seconds for a full pipe or a stopped terminal to be read, where printing may be given up
_LOST = "\n[some output could not be written here]\n"
# What may be written to a pipe, or to a terminal that somebody stopped, without waiting, once it is ready.
_PIPE_CHUNK = getattr(select, "PIPE_BUF", 512)
_TERMINAL_CHUNK = 256


def visible(text: str) -> str:
    r"""Return ``text`` with its control characters written as escapes (``\x1b``): a file name must not steer a
    terminal. Newlines count among them, bytes that are no UTF-8 (surrogates) too."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible_lines(text: str) -> str:
    """:func:`visible`, but for newlines and tabs."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" else visible(c) for c in text)


def plotted(text: str) -> str:
    """:func:`visible_lines` for matplotlib, which would read a formula between two dollar signs."""
    return visible_lines(text).replace("$", r"\$")


class Destination:
    """Where a stream's text goes; writing never raises OSError.

    ``lost`` is the first error. ``optional``: a pipe or terminal that nobody reads is waited for no longer than
    :data:`PATIENCE`, and otherwise for ever."""

    def __init__(self, stream: TextIO | None):
        self.stream, self.optional = stream, False
        self.lost: OSError | None = None
        self._descriptor = _descriptor(stream)
        self._stalled = self._torn = False
        self._chunk = _TERMINAL_CHUNK if self.isatty() else _PIPE_CHUNK
        self.flush()  # the text may go past the stream's buffer from here on

    @property
    def encoding(self) -> str:
        """Of the stream."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def flush(self) -> None:
        """Write what the stream holds back."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            pass  # what is written next reports it

    def put(self, text: str) -> None:
        """Write text."""
        data = text.encode(self.encoding, "backslashreplace")
        try:
            if self._torn and not self.isatty():
                self._write(_LOST.encode(self.encoding, "replace"))
            self._torn = False
            self._write(data)
        except OSError as error:
            self.lost, self._torn = self.lost or error, True

    def _write(self, data: bytes) -> None:
        if self._descriptor is not None:
            self._write_to(self._descriptor, memoryview(data))
        elif self.stream is None:
            raise OSError(errno.EBADF, "it is closed")
        else:
            text = data.decode(self.encoding)
            try:
                self.stream.write(text)
                if text.endswith("\n"):
                    self.stream.flush()
            except ValueError as error:  # of a closed file
                raise OSError(errno.EBADF, "it is closed") from error

    def _write_to(self, descriptor: int, data: memoryview) -> None:
        # Past Python's buffers, which would keep what a full disk refused, and complain when the interpreter ends.
        begun = time.monotonic()
        while data:
            patience = None
            if self.optional:
                patience = 0.0 if self._stalled else max(0.0, begun + PATIENCE - time.monotonic())
            if not _ready(descriptor, patience):
                self._stalled = True
                raise BlockingIOError(errno.EAGAIN, "nobody reads it")
            try:
                data = data[os.write(descriptor, data[: self._chunk]) :]
            except BlockingIOError:
                time.sleep(0.01)  # some sockets are called ready before they take this much
            else:
                self._stalled, begun = False, time.monotonic()


class Output(io.TextIOBase):
    """A text stream over another one, or over none. Control characters but newlines and tabs are written as escapes,
    and so is what its encoding lacks; what cannot be written is dropped."""

    def __init__(self, stream: TextIO | None, escape: bool = True):
        self.destination = Destination(stream)
        self._escape = escape

    def styled(self) -> "Output":
        """The same destination for what writes a terminal's control sequences itself, and escapes names itself."""
        lane = Output.__new__(Output)
        lane.destination, lane._escape = self.destination, False
        return lane

    def write(self, text: str) -> int:
        """Write what can be written; return the length of all."""
        self.destination.put(visible_lines(text) if self._escape else text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream below, if it holds anything back."""
        self.destination.flush()

    def writable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Leave the stream below open: it is not this one's."""
        self.flush()

    def isatty(self) -> bool:
        """Whether the stream below is a terminal."""
        return self.destination.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream below."""
        if self.destination.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.destination.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream below."""
        return self.destination.encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What is done to characters that the encoding lacks."""
        return "backslashreplace"


def styled(stream: TextIO | None) -> Output:
    """A stream that never raises over ``stream``, for what writes a terminal's control sequences itself."""
    return stream.styled() if isinstance(stream, Output) else Output(stream, escape=False)


@contextmanager
def protected_streams() -> Iterator[Output]:
    """Let standard output, which is returned, and standard error be :class:`Output` for the time of a block."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, Output):
        yield sys.stdout
        return
    _occupy_standard_descriptors()
    sys.stdout, sys.stderr = output, _ = Output(sys.stdout), Output(sys.stderr)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = before


def printing_is_optional() -> None:
    """From here on the product of the process is its files: text that cannot be written does not matter."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Output):
            stream.destination.optional = True


def _occupy_standard_descriptors() -> None:
    """A file opened while one of them is closed would get its number, and with it what libraries print there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle == number:
                os.set_inheritable(handle, True)
            else:
                os.dup2(handle, number)
                os.close(handle)


def _descriptor(stream: Any) -> int | None:
    """Of a stream that is a plain file of the operating system, and not one that a notebook or a test captures."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if os.name != "posix" or type(stream) is not io.TextIOWrapper or not isinstance(raw, io.FileIO):
        return None
    try:
        return raw.fileno()
    except ValueError:
        return None


def _ready(descriptor: int, patience: float | None) -> bool:
    """Whether a write would not wait, after at most so many seconds; an error that a write would report counts."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if patience is None else 1000 * patience))
