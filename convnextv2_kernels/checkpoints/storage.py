"""Checkpoint files: read without running their code and within bounds, written completely or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from .._console import visible
from .._files import atomic_file, open_regular, parse_json, remove_abandoned
from ..errors import FileError
from .objects import UnknownName
from .state import shown
from .torch_files import read_torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
MAX_HEADER_BYTES = 16 << 20  # of a safetensors file
MAX_TENSORS = 100_000
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
_INDEX = "index.json"
_WRAPPER = {"official": "model", "official-sparse": "model", "fcmae": "model", "mmpretrain": "state_dict"}


@dataclass(frozen=True)
class CheckpointFile:
    """What a file holds: its content, and the metadata of a safetensors file."""

    path: Path
    content: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the training that the weights come from, as far as the file tells: ``config`` of a training
        checkpoint of this library, or the metadata."""
        config = self.content.get("config")
        return config if isinstance(config, Mapping) else self.metadata


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """A checkpoint file, on the CPU.

    ``.safetensors`` files are read as such, all others by :func:`load_torch`; the content tells which it is. From a
    folder, ``model.safetensors`` or ``pytorch_model.bin`` is read.

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        FileError: a file that is damaged, is not a checkpoint, exceeds a bound, or could only be read by running its
            code.
        OSError: a file that cannot be read.
    """
    path = _locate(path)
    metadata: Mapping[str, str] = {}
    with _opened(path) as file, _told(path):
        if _kind(file, path) == "safetensors":
            metadata = _safetensors_metadata(file)
            content = safetensors.torch.load_file(path)
        else:
            content = read_torch(file)
    if not isinstance(content, Mapping):
        raise FileError(
            f"{visible(str(path))} holds a {type(content).__name__}, expected a state_dict or a dict around one"
        )
    return CheckpointFile(path, content, metadata)


def read_file(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file, see :func:`read_checkpoint_file`."""
    return read_checkpoint_file(path).content


def load_torch(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU.

    Nothing that the file names is imported or called; besides tensors and plain containers it may hold what
    :mod:`.objects` lists. Unlike torch.load, this verifies the checksums of a zip archive, and pays for nothing that
    the file only claims to have: no compressed or overlapping members, no tensor that is larger than its storage.

    Args:
        path: a regular file.

    Raises:
        FileError: a file that is damaged, was not written by torch.save, exceeds a bound, or could only be read by
            running its code.
        OSError: no such file, or one that cannot be read.
    """
    with _opened(path) as file, _told(path):
        return read_torch(file)


def write_file(path: Path, state_dict: dict[str, Tensor], to: str, settings: Mapping[str, str] | None = None) -> None:
    """Write a state_dict of format ``to``, wrapped in a ``.pt``, ``.pth`` or ``.bin`` file as its code base does.

    ``settings`` that its names do not tell become metadata, or ``config`` beside the wrapped state_dict.

    Raises:
        OSError: the file cannot be written; an older one of that name is left as it was.
    """
    wrapper, settings = _WRAPPER.get(to), settings or {}
    try:
        remove_abandoned(path.parent, path.name)
        with atomic_file(path) as file:
            if path.suffix == ".safetensors":
                file.write(safetensors.torch.save(state_dict, metadata={"format": "pt", **settings}))
            else:
                about = {"config": dict(settings)} if settings else {}
                torch.save({wrapper: state_dict, **about} if wrapper else state_dict, file)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {visible(str(path))}: {getattr(error, 'strerror', None) or error}") from error


def _locate(path: Path) -> Path:
    """The file that ``path`` means, after a look at what people give instead of one."""
    name = visible(str(path))
    if path.is_dir():
        for inside in _IN_FOLDER:
            if (path / inside).is_file():
                return path / inside
        if any(_shard_of(entry.name) for entry in path.iterdir()):
            raise FileError(f"{name} is a sharded checkpoint, expected one file with all weights")
        raise FileNotFoundError(f"{name} is a folder without {' or '.join(_IN_FOLDER)}")
    if not path.exists():
        if found := re.match(r"([a-z][a-z0-9+._-]+):(/*)", str(path), re.IGNORECASE):
            # a Path has lost one of the two slashes
            address = f"{found[1]}:{'//' if found[2] else ''}{visible(str(path)[found.end() :])}"
            raise FileNotFoundError(f"{address} is an address, expected a file on this machine: download it first")
        raise FileNotFoundError(f"{name}: there is no such file")
    if shard := _shard_of(path.name):
        raise FileError(f"{name} is {shard} of a sharded checkpoint, expected one file with all weights")
    return path


def _shard_of(name: str) -> str | None:
    if name.endswith(f".{_INDEX}"):
        return "the index"
    found = re.fullmatch(r".*-0*(\d+)-of-0*(\d+)(\.\w+)?", name)
    return f"shard {found[1]} of {found[2]}" if found and found[2] != "1" else None


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{visible(str(path))}: there is no such file") from None
    except OSError as error:
        raise OSError(f"{visible(str(path))} cannot be read: {error.strerror or error}") from error


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes its readers raise becomes one sentence that names the file."""
    name = visible(str(path))
    try:
        yield
    except UnknownName as error:
        raise FileError(
            f"{name} is not read because it asks for {shown(str(error))}, and anything but tensors, plain containers "
            "and known settings could run code; if you trust the file, load it with PyTorch yourself and save its "
            "state_dict alone"
        ) from None
    except MemoryError as error:
        raise FileError(f"{name} does not fit into the memory") from error
    except OSError as error:
        raise OSError(f"{name} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        text = str(error).splitlines()
        raise FileError(
            f"{name} is not a readable checkpoint: {shown(text[0]) if text else type(error).__name__}"
        ) from error


def _kind(file: BinaryIO, path: Path) -> str:
    """ "safetensors" or "torch", by the first bytes of the file: names can be wrong."""
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("a pointer of Git LFS instead of the file it stands for (git lfs pull fetches it)")
    if start[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError("a page of HTML instead of the file it was to be")
    # A length in 8 bytes, then JSON. The first of them may be those of a zip archive or a pickle.
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith((b"PK", b"\x80")):  # a zip archive or a pickle: what torch.save writes
        return "torch"
    return "safetensors" if path.suffix.lower() == ".safetensors" else "torch"


def _safetensors_metadata(file: BinaryIO) -> dict[str, str]:
    """The metadata of a safetensors file whose header costs no more than it should."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"a header that ends beyond the file of {size} bytes")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, of which at most {MAX_HEADER_BYTES} are read")
    text = file.read(length)
    header = parse_json(text, "its header")
    json.loads(text, object_pairs_hook=_require_distinct)
    if not isinstance(header, dict):
        raise ValueError("a header that is no table of tensors")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors, of which at most {MAX_TENSORS} are read")
    metadata = header.get("__metadata__") or {}
    return metadata if isinstance(metadata, dict) else {}


def _require_distinct(pairs: list[tuple[str, Any]]) -> None:
    """The reader of safetensors takes the last of two equal names."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a header with two tensors of one name")
