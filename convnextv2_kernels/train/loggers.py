"""What a run writes step by step: log.jsonl, metrics.jsonl and scalars for TensorBoard."""

import contextlib
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .._files import atomic_file, open_regular, parse_json
from ..errors import FileError, UserError, describe_os_error

MAX_LINE = 1 << 20  # bytes; a record takes about 150
DAMAGED = ".damaged"
LISTED = 5  # line numbers in a warning


class StepLog:
    """Append one JSON object a step to a file.

    Opened for a run that has done ``step`` steps, it first drops the lines of later steps at the end, and a last line
    cut short by a kill: a resumed run writes them again. Other lines that are no records go to a file beside it, named
    with :data:`DAMAGED`, and ``note`` is told their numbers. The file is made by the first line.

    Raises:
        UserError: a log that cannot be read, or anything but a regular file.
    """

    def __init__(self, path: Path, step: int, note: Callable[[str], None] = print):
        self._path, self._note = path, note
        self._file: _Appended | None = None
        try:
            if path.exists() or path.is_symlink():
                self._keep(step)
        except FileError as error:
            raise UserError(f"{error}; move it away, or give a new --output.") from error
        except OSError as error:
            text = describe_os_error(error)
            raise UserError(f"{path} cannot be resumed ({text}); make it readable, or give a new --output.") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line and hand it to the operating system.

        Raises:
            OSError: naming the file, which then ends with the line before.
        """
        if self._file is None:
            self._file = _Appended(self._path, "ab")
        self._file.append(json.dumps(record).encode() + b"\n")

    def sync(self) -> None:
        """Force the lines to disk: before a checkpoint, so that the log never lags behind one.

        Raises:
            OSError: naming the file.
        """
        if self._file is None:
            return
        self._file.sync()
        if not self._file.in_place():
            self.close()
            self._file = _Appended(self._path, "ab")
            self._note(f"warning: {self._path} was removed or replaced during the run; a new one was begun")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _keep(self, step: int) -> None:
        with open_regular(self._path) as file:
            found = _survey(file, step)
            if found.disorder:
                self._note(f"warning: {self._path}: the steps do not ascend from line {found.disorder} on; all stay")
            if found.strange:
                file.seek(0)
                self._set_aside(file, step, found.end)
                return
            if found.end == found.size and found.complete:
                return
        with self._path.open("r+b", buffering=0) as file:
            file.truncate(found.end)
            if not found.complete:
                file.seek(found.end)
                file.write(b"\n")
            os.fsync(file.fileno())

    def _set_aside(self, file: BinaryIO, step: int, end: int) -> None:
        """Rewrite the log without what is no record of a step up to ``step``, and keep that beside it."""
        beside = self._path.with_name(self._path.name + DAMAGED)
        numbers: list[str] = []
        more = 0
        with atomic_file(self._path) as kept, atomic_file(beside) as damaged:
            if beside.exists():
                with open_regular(beside) as before:
                    shutil.copyfileobj(before, damaged)
            for line in _lines(file):
                if line.step is not None and line.step <= step:
                    kept.write(line.start.removesuffix(b"\n") + b"\n")
                elif line.offset < end or (line.step is None and line.complete):
                    damaged.write(line.start.removesuffix(b"\n") + b"\n")
                    if len(numbers) < LISTED:
                        numbers.append(str(line.number))
                    else:
                        more += 1
        lines = f"line {', '.join(numbers)}" + (f" and {more} more" if more else "")
        self._note(
            f"warning: {self._path}: no record of a step, or not in its place: {lines}; kept in {beside.name}, "
            f"all others up to step {step} stay"
        )


class _Line(NamedTuple):
    """Of a log: its place, its first :data:`MAX_LINE` bytes, whether it has an end, and its step if it is a record."""

    number: int
    offset: int
    start: bytes
    complete: bool
    step: int | None


def _lines(file: BinaryIO) -> Iterator[_Line]:
    number = offset = 0
    while start := file.readline(MAX_LINE):
        number, size, last = number + 1, len(start), start
        while not last.endswith(b"\n") and (rest := file.readline(MAX_LINE)):
            size, last = size + len(rest), rest
        step = _step_of(start) if size == len(start) else None
        yield _Line(number, offset, start, last.endswith(b"\n"), step)
        offset += size


def _step_of(line: bytes) -> int | None:
    try:
        record = parse_json(line, "")
    except FileError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step > 0 else None


class _Survey(NamedTuple):
    """Of a log: bytes up to the end of the last record that stays, and whether that has its newline; bytes in all;
    lines to set aside; the number of the first line whose step is not above the one before, 0 without."""

    end: int
    complete: bool
    size: int
    strange: int
    disorder: int


def _survey(file: BinaryIO, step: int) -> _Survey:
    end = size = strange = later = disorder = previous = 0
    complete = True
    for line in _lines(file):
        size = file.tell()
        if line.step is None:
            strange += line.complete
        elif line.step > step:
            later += 1
        else:
            strange, later = strange + later, 0
            end, complete = size, line.complete
            disorder = disorder or (line.number if line.step <= previous else 0)
            previous = line.step
    return _Survey(end, complete, size, strange, disorder)


class _Appended:
    """A file that takes what is appended whole or not at all; OSErrors name it."""

    def __init__(self, path: Path, mode: str):
        self.path = path
        # Without a buffer, which would keep what a full disk refused and fail on it again.
        self._file: Any = path.open(mode, buffering=0)
        self._end = os.fstat(self._file.fileno()).st_size

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        with self._naming():
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self._end += len(data)

    def sync(self) -> None:
        with self._naming():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._naming():
            self._file.close()

    def in_place(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise


class Board:
    """Write scalars to a new event file in ``folder``, one point a step; without a folder, write nothing.

    Opened for a run that has done ``step`` steps; points of later steps that an interrupted run left are hidden.

    Raises:
        UserError: no tensorboard, or a file that cannot be made.
    """

    # Not by torch's SummaryWriter: it writes in a thread, which dies with a traceback on a full disk.
    def __init__(self, folder: Path | None, step: int):
        self._file: _Appended | None = None
        if folder is None:
            return
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard.") from error
        self._event, self._summary, self._record = Event, Summary, RecordWriter
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _Appended(folder / name, "xb")
            self._add(file_version="brain.Event:2")
            self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        except OSError as error:
            raise UserError(f"--tensorboard: {describe_os_error(error)}.") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step, by name.

        Raises:
            OSError: naming the file.
        """
        if self._file is not None:
            for name, value in values.items():
                self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _add(self, **content: Any) -> None:
        record = io.BytesIO()
        self._record(record).write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.append(record.getvalue())
