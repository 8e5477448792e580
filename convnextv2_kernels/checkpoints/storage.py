"""Checkpoint files: read without running their code, written completely or not at all."""

from __future__ import annotations

import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .._files import atomic_file, open_regular
from ..errors import FileError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
_WRAPPER = {"official": "model", "official-sparse": "model", "fcmae": "model", "mmpretrain": "state_dict"}


def read_file(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file, on the CPU.

    ``.safetensors`` files are read as such, all others by ``torch.load(weights_only=True)``, which builds tensors and
    plain containers only; ``argparse.Namespace``, in which the official scripts save their arguments, is allowed
    because building one runs no code. Unlike torch.load, this verifies the checksums of a zip archive. From a folder,
    ``model.safetensors`` or ``pytorch_model.bin`` is read.

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        ValueError: a file that is damaged, is not a checkpoint, or could only be read by running its code.
    """
    if path.is_dir():
        names = [name for name in _IN_FOLDER if (path / name).is_file()]
        if not names:
            raise FileNotFoundError(f"{path} is a folder without {' or '.join(_IN_FOLDER)}")
        path = path / names[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    content = _read(path, lambda: _READERS[_kind(path)](path))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state_dict or a dict around one")
    return content


def load_torch(path: Path, expect_bytes: int | None = None) -> Any:
    """The content of a file of ``torch.save``, on the CPU: tensors and plain containers, whose checksums are right.

    ``expect_bytes``: the most that the file may hold.

    Raises:
        FileError: anything but a regular file, or a larger one.
        ValueError: a file that is damaged, or could only be read by running its code.
        OSError: a file that cannot be read.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
    if expect_bytes is not None and size > expect_bytes:
        raise FileError(f"{path} holds {size} bytes, expected at most {expect_bytes}")
    return _read(path, lambda: _read_torch(path))


def _read(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` returns of the file; whatever it raises becomes one sentence."""
    try:
        return read()
    except Exception as error:  # A damaged file makes the unpickler and the archive readers raise anything.
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} is not read because it asks for {wanted[1]}, and anything but tensors and plain containers "
                "could run code; if you trust the file, load it yourself with torch.load(weights_only=False) and pass "
                "the state_dict"
            ) from None
        raise ValueError(f"{path} is not a readable checkpoint: {_reason(error)}") from error


def _kind(path: Path) -> str:
    """ "safetensors" or "torch", by the first bytes of the file: names can be wrong."""
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("a pointer of Git LFS instead of the file it stands for (git lfs pull fetches it)")
    if start.startswith((b"PK", b"\x80\x02")):  # a zip archive or a pickle: what torch.save writes
        return "torch"
    # a length in 8 bytes, then JSON
    return "safetensors" if start[8:9] == b"{" or path.suffix.lower() == ".safetensors" else "torch"


def write_file(path: Path, state_dict: dict[str, Tensor], to: str) -> None:
    """Write a state_dict of format ``to``, wrapped in a ``.pt``, ``.pth`` or ``.bin`` file as its code base does.

    Raises:
        OSError: the file cannot be written; an older one of that name is left as it was.
    """
    wrapper = _WRAPPER.get(to)
    try:
        with atomic_file(path) as file:
            if path.suffix == ".safetensors":
                file.write(safetensors.torch.save(state_dict, metadata={"format": "pt"}))
            else:
                torch.save({wrapper: state_dict} if wrapper else state_dict, file)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
    # an open file: given a name, torch.load would judge by its extension
    with path.open("rb") as file, torch.serialization.safe_globals([Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], Any]] = {"safetensors": safetensors.torch.load_file, "torch": _read_torch}


def _reason(error: Exception) -> str:
    """The first informative line; torch.load precedes it with advice to disable its checks."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.splitlines()[0] if text else type(error).__name__
