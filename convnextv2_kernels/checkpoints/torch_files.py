"""The content of files of torch.save: a zip archive since PyTorch 1.6, before that pickles and numbers in a row."""

from __future__ import annotations

import io
import os
import struct
import sys
from typing import Any, BinaryIO

import torch

from .archive import Archive, fill
from .objects import StorageType, Stored, find
from .pickles import unpickle
from .state import shown

MAX_PICKLE_BYTES = 128 << 20  # what a file holds beside the numbers of its tensors
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


def read_torch(file: BinaryIO) -> Any:
    """The content of a file, on the CPU.

    Raises:
        ValueError: a file that is damaged, was not written by torch.save, or exceeds a bound.
    """
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK"):
        return _read_zip(Archive(file))
    if start[257:262] == b"ustar":
        raise ValueError("a tar file, as of PyTorch before 0.1.10: save it again with one between 0.4 and 2.0")
    if start.startswith(b"\x80"):
        return _read_legacy(file)
    raise ValueError("neither safetensors nor what torch.save writes" if start else "an empty file")


def _read_zip(archive: Archive) -> Any:
    """The pickle, and a member for each storage."""
    root = next(iter(archive.members), "").partition("/")[0]
    if f"{root}/data.pkl" not in archive.members:
        raise ValueError("an archive without data.pkl, which torch.save writes")
    order = archive.read(f"{root}/byteorder", 16) if f"{root}/byteorder" in archive.members else b"little"
    if order not in (b"little", b"big"):
        raise ValueError("an archive with an unknown order of bytes")
    storages: dict[str, torch.UntypedStorage] = {}

    def persistent(reference: Any) -> Stored:
        dtype, key, numel, _ = _storage_reference(reference)
        nbytes = numel * dtype.itemsize
        if key not in storages:
            storages[key] = archive.read_storage(f"{root}/data/{key}", nbytes)
            if order.decode() != sys.byteorder:
                storages[key].byteswap(dtype)
        if storages[key].nbytes() != nbytes:
            raise ValueError(f"a storage {shown(key)} of two sizes")
        return Stored(storages[key], dtype, numel)

    content = unpickle(io.BytesIO(archive.read(f"{root}/data.pkl", MAX_PICKLE_BYTES)), find, persistent)
    archive.verify()
    return content


def _read_legacy(file: BinaryIO) -> Any:
    """Five pickles, then for each storage the number of its elements and these."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if unpickle(stream, find, _no_reference) != _LEGACY_MAGIC:
        raise ValueError("a pickle that torch.save did not write")
    if unpickle(stream, find, _no_reference) != _LEGACY_VERSION:
        raise ValueError("a file of an unknown version of torch.save")
    system = unpickle(stream, find, _no_reference)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError("a file of a big-endian machine, written by PyTorch before 1.6")
    storages = _LegacyStorages(size)
    content = unpickle(stream, find, storages.find)
    keys = unpickle(stream, find, _no_reference)
    file.seek(stream.tell())
    storages.fill(keys, file)
    return content


class _LegacyStorages:
    """Storages, made as the pickle names them but no more than the file can hold, and filled once it has ended."""

    def __init__(self, size: int):
        self._size = self._left = size
        self._whole: dict[str, Stored] = {}

    def find(self, reference: Any) -> Stored:
        """A storage or a part of one."""
        dtype, key, numel, part = _storage_reference(reference)
        if key not in self._whole:
            self._left -= numel * dtype.itemsize
            if self._left < 0:
                raise ValueError(f"storages that are larger than the file of {self._size} bytes")
            memory = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, device="cpu").untyped_storage()
            self._whole[key] = Stored(memory, dtype, numel)
        whole = self._whole[key]
        if whole.numel != numel or whole.dtype != dtype:
            raise ValueError(f"a storage {shown(key)} of two sizes")
        if part is None:
            return whole
        _, offset, length = part
        if not (type(offset) is type(length) is int and offset >= 0 and 0 <= length <= numel - offset):
            raise ValueError(f"a part beyond the storage {shown(key)}")
        return Stored(whole.memory[offset * dtype.itemsize : (offset + length) * dtype.itemsize], dtype, length)

    def fill(self, keys: Any, file: BinaryIO) -> None:
        """Read the numbers, in the order of ``keys``."""
        if not (
            isinstance(keys, list) and all(type(key) is str for key in keys) and sorted(keys) == sorted(self._whole)
        ):
            raise ValueError("a file that lacks storages, as after an unfinished download")
        for key in keys:
            stored = self._whole[key]
            count = file.read(8)
            if len(count) < 8 or struct.unpack("<q", count)[0] != stored.numel:
                raise ValueError("a file that ends before its tensors, as after an unfinished download")
            fill(torch.empty(0, dtype=torch.uint8, device="cpu").set_(stored.memory), file)


def _no_reference(_: Any) -> Any:
    raise ValueError("a damaged pickle: a tensor where none belongs")


def _storage_reference(reference: Any) -> tuple[torch.dtype, str, int, Any]:
    """Dtype, key, number of elements and part of the storage that a pickle refers to."""
    if not (isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] in ("storage", b"storage")):
        raise ValueError("a damaged pickle: a reference to something that is no storage")
    _, kind, key, _, numel, *view = reference
    valid = isinstance(kind, StorageType) and type(key) is str and type(numel) is int and 0 <= numel < 1 << 60
    part = view[0] if view else None
    if not valid or not (part is None or (isinstance(part, tuple) and len(part) == 3)):
        raise ValueError("a damaged pickle: a reference to something that is no storage")
    return kind.dtype, key, numel, part
