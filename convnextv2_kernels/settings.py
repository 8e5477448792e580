"""Every environment variable of the package, read once at import and checked in one place.

``current`` holds the values. Programs change one for a while by :func:`override`; ``docs/environment.md`` and ``info``
are checked against :data:`VARIABLES`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = "CONVNEXTV2_KERNELS_"
SAVE_POLICIES = ("inputs", "normalized", "hidden")


class Variable(NamedTuple):
    """An environment variable: the attribute of :class:`Settings` it sets, its default, and how its text is read.
    ``parse`` returns None for a text it does not accept; ``expected`` completes "NAME must be ..."."""

    name: str
    attribute: str
    default: Any
    parse: Callable[[str], Any]
    expected: str


def _one_of(*words: str) -> tuple[Callable[[str], Any], str]:
    return lambda text: text if text in words else None, f"one of {', '.join(words)}"


def _positive(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) >= 1 else None


def _existing(text: str) -> Path | None:
    return Path(text) if Path(text).exists() else None


def _flag(text: str) -> bool:
    return text not in ("", "0")


VARIABLES = (
    # names are checked against the registry, which knows them
    Variable(f"{PREFIX}BACKEND", "backend", "auto", str, "the name of a backend"),
    Variable(f"{PREFIX}CPU_ISA", "cpu_isa", "", *_one_of("avx512", "avx2", "baseline")),
    Variable(f"{PREFIX}CPU_GEMM", "cpu_gemm", "auto", *_one_of("auto", "onednn", "mm")),
    Variable(f"{PREFIX}CHUNK_BYTES", "chunk_bytes", None, _positive, "a positive number of bytes"),
    Variable(f"{PREFIX}SAVE", "save", None, *_one_of(*SAVE_POLICIES)),
    Variable(f"{PREFIX}CUDA_CONV", "cuda_conv", "fma", *_one_of("fma", "tensor")),
    Variable(f"{PREFIX}CUDA_EMULATION", "cuda_emulation", None, _existing, "the path of a library that exists"),
    Variable(f"{PREFIX}TRITON_PRODUCTS", "triton_gemms", "auto", *_one_of("auto", "fused", "library")),
    Variable(f"{PREFIX}CACHE", "cache", None, Path, "a folder"),
    Variable("TRITON_INTERPRET", "triton_interpret", False, _flag, "0 or 1"),
)


class Settings:
    """One attribute for each of :data:`VARIABLES`."""

    __slots__ = tuple(variable.attribute for variable in VARIABLES)

    backend: str
    cpu_isa: str
    cpu_gemm: str
    chunk_bytes: int | None
    save: str | None
    cuda_conv: str
    cuda_emulation: Path | None
    triton_gemms: str
    cache: Path | None
    triton_interpret: bool

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """The settings of an environment; a variable that is empty counts as not set.

        Raises:
            ValueError: a value that is not accepted.
        """
        settings = cls()
        for variable in VARIABLES:
            text = environment.get(variable.name)
            value = variable.parse(text) if text else variable.default
            if text and value is None:
                raise ValueError(f"{variable.name} must be {variable.expected}, got {text!r}")
            setattr(settings, variable.attribute, value)
        return settings


current = Settings.read(os.environ)


@contextlib.contextmanager
def override(**values: Any) -> Iterator[None]:
    """Inside, attributes of :data:`current` have other values: ``override(save="hidden", chunk_bytes=1 << 20)``."""
    for variable in VARIABLES:
        value = values.get(variable.attribute)
        if value is not None and variable.parse(str(value)) is None:
            raise ValueError(f"{variable.attribute} must be {variable.expected}, got {value!r}")
    before = {name: getattr(current, name) for name in values}
    for name, value in values.items():
        setattr(current, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(current, name, value)
