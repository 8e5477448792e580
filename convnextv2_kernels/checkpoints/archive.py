"""The zip archives that torch.save writes: its members are stored, one after the other, each with a checksum.

Everything that a directory claims is compared with the file before a member is read, so that reading one costs no more
than its bytes: a member that is compressed, shares bytes with another or ends beyond the file is refused.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MAX_MEMBERS = 100_000  # a training checkpoint of the largest published size has about 2000
MAX_DIRECTORY_BYTES = 32 << 20
_CHUNK = 1 << 20
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF  # a size or offset that stands in the entry's zip64 field instead


class Member(NamedTuple):
    """A file in the archive: its bytes begin at ``start``."""

    name: str
    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    name: bytes
    header: int  # offset of the local header, which repeats the entry in front of the bytes
    size: int
    crc: int
    is_stored: bool


class Archive:
    """The members of an archive by name.

    Raises:
        ValueError: no archive, or one that torch.save would not have written.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._unread: set[str] = set()
        start, end, count = self._directory()
        if count > MAX_MEMBERS:
            raise ValueError(f"an archive of {count} members, of which at most {MAX_MEMBERS} are read")
        if end - start > MAX_DIRECTORY_BYTES:
            raise ValueError(
                f"an archive with a directory of {end - start} bytes, of which at most {MAX_DIRECTORY_BYTES} are read"
            )
        file.seek(start)
        entries = sorted(_entries(file.read(end - start), count), key=lambda entry: entry.header)
        if any(entry.name.endswith(b"/constants.pkl") for entry in entries):
            raise ValueError("a TorchScript program (torch.jit.save), expected the weights alone")
        ends = [entry.header for entry in entries[1:]] + [start]
        self.members = {m.name: m for m in map(self._member, entries, ends)}
        if len(self.members) < len(entries):
            raise ValueError("an archive with two members of one name")
        self._unread = set(self.members)

    def _directory(self) -> tuple[int, int, int]:
        """Where the directory begins and ends, and how many members it has."""
        size = self._file.seek(0, os.SEEK_END)
        tail_start = max(0, size - _END.size - _LONGEST_COMMENT)
        self._file.seek(tail_start)
        tail = self._file.read(size - tail_start)
        where = tail.rfind(b"PK\5\6")
        if where < 0 or len(tail) - where < _END.size:
            raise ValueError("an archive without its end, as of an unfinished download")
        _, _, _, _, count, length, start, comment = _END.unpack_from(tail, where)
        if where + _END.size + comment != len(tail):
            raise ValueError("an archive with bytes behind its end")
        end = tail_start + where
        if end >= _LOCATOR64.size:
            self._file.seek(end - _LOCATOR64.size)
            signature, _, end64, _ = _LOCATOR64.unpack(self._file.read(_LOCATOR64.size))
            if signature == b"PK\6\7":
                if end64 > end - _LOCATOR64.size - _END64.size:
                    raise ValueError("an archive with a damaged directory")
                self._file.seek(end64)
                record = _END64.unpack(self._file.read(_END64.size))
                if record[0] != b"PK\6\6":
                    raise ValueError("an archive with a damaged directory")
                count, length, start = record[7:]
                end = end64
        if start + length != end:
            raise ValueError("an archive with a damaged directory")
        return start, end, count

    def _member(self, entry: _Entry, end: int) -> Member:
        """``end``: where the next member's header or the directory begins."""
        name = entry.name.decode(errors="replace")
        if not entry.is_stored:
            raise ValueError(f"an archive in which {name} is compressed or encrypted, and torch.save does neither")
        self._file.seek(entry.header)
        head = self._file.read(_LOCAL.size)
        if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
            raise ValueError(f"an archive without the header of {name}")
        fields = _LOCAL.unpack(head)
        method, name_length, extra_length = fields[3], fields[9], fields[10]
        if method != 0 or self._file.read(name_length) != entry.name:
            raise ValueError(f"an archive that describes {name} in two ways")
        start = entry.header + _LOCAL.size + name_length + extra_length
        if start + entry.size > end:
            raise ValueError(f"an archive in which {name} is larger than its place, or shares it")
        return Member(name, start, entry.size, entry.crc)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a member of at most ``limit``.

        Raises:
            ValueError: no such member, a larger one, or a wrong checksum.
        """
        member = self._find(name)
        if member.size > limit:
            raise ValueError(f"{name} of {member.size} bytes, of which at most {limit} are read")
        self._file.seek(member.start)
        content = self._file.read(member.size)
        self._check(member, zlib.crc32(content))
        return content

    def read_storage(self, name: str, size: int) -> torch.UntypedStorage:
        """A member of ``size`` bytes as the memory of tensors.

        Raises:
            ValueError: no such member, one of another size, or a wrong checksum.
        """
        member = self._find(name)
        if member.size != size:
            raise ValueError(f"{name} has {member.size} bytes instead of {size}")
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._file.seek(member.start)
        self._check(member, fill(memory, self._file))
        return memory.untyped_storage()

    def verify(self) -> None:
        """Compare the checksums of the members that have not been read.

        Raises:
            ValueError: one is wrong.
        """
        for member in sorted((self.members[name] for name in self._unread), key=lambda member: member.start):
            self._file.seek(member.start)
            crc = 0
            for size in _pieces(member.size):
                crc = zlib.crc32(self._file.read(size), crc)
            self._check(member, crc)

    def _find(self, name: str) -> Member:
        if name not in self.members:
            raise ValueError(f"an archive without {name}")
        return self.members[name]

    def _check(self, member: Member, crc: int) -> None:
        if crc != member.crc:
            raise ValueError(f"the checksum of {member.name} is wrong")
        self._unread.discard(member.name)


def fill(memory: Tensor, file: BinaryIO) -> int:
    """Read ``memory [bytes]`` from a file; return the checksum of the bytes.

    Raises:
        ValueError: the file ends before.
    """
    buffer = bytearray(min(_CHUNK, max(1, memory.numel())))
    piece = torch.frombuffer(buffer, dtype=torch.uint8)
    done, crc = 0, 0
    for size in _pieces(memory.numel()):
        with memoryview(buffer)[:size] as part:
            if file.readinto(part) != size:  # type: ignore[attr-defined]
                raise ValueError("the file ends within a tensor, as after an unfinished download")
            crc = zlib.crc32(part, crc)
        memory[done : done + size] = piece[:size]
        done += size
    return crc


def _pieces(size: int) -> Iterator[int]:
    yield from (min(_CHUNK, size - done) for done in range(0, size, _CHUNK))


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory):
            raise ValueError("an archive with a damaged directory")
        fields = _ENTRY.unpack_from(directory, at)
        if fields[0] != b"PK\1\2":
            raise ValueError("an archive with a damaged directory")
        flags, method, crc = fields[3], fields[4], fields[7]
        name_at = at + _ENTRY.size
        extra_at = name_at + fields[10]
        at = extra_at + fields[11] + fields[12]
        name = directory[name_at:extra_at]
        size, stored, header = _wide(fields, directory[extra_at : extra_at + fields[11]])
        yield _Entry(name, header, size, crc, method == 0 and stored == size and not flags & 0x2041)
    if at != len(directory):
        raise ValueError("an archive with a damaged directory")


def _wide(fields: tuple[Any, ...], extra: bytes) -> tuple[int, int, int]:
    """Size, size as stored and offset of an entry, from its zip64 field where they are too large for their own."""
    stored, size, header = fields[8], fields[9], fields[16]
    wide: Iterator[int] = iter(())
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1 and len(extra) >= 4 + length:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            break
        extra = extra[4 + length :]
    try:
        size = next(wide) if size == _IN_EXTRA else size
        stored = next(wide) if stored == _IN_EXTRA else stored
        header = next(wide) if header == _IN_EXTRA else header
    except StopIteration:
        raise ValueError("an archive with a damaged directory") from None
    return size, stored, header
