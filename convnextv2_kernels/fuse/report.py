"""The result of :func:`convnextv2_kernels.fuse`, for people and for programs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from .families import KINDS, V1_BLOCK


class Replaced(NamedTuple):
    """A block that was fused: its name in the model, and what it is."""

    name: str
    kind: str


class Skipped(NamedTuple):
    """A block that was not fused, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """The blocks of a model after :func:`convnextv2_kernels.fuse`; it prints as a summary.

    Attributes:
        model: name of the model's class.
        replaced: blocks fused by this call.
        skipped: blocks of a known family, or similar to one, that were not fused, each with the reason; also those of
            ConvNeXt V1, and those fused before that have changed since and run their own forward.
        already_fused: names of blocks fused before, or of this library's own.
        backend: the backend of the fused blocks, with the reason if it is the plain PyTorch reference.
    """

    model: str
    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]
    already_fused: tuple[str, ...]
    backend: str

    def __str__(self) -> str:
        blocks = len(self.replaced) + len(self.skipped) + len(self.already_fused)
        lines = [f"fused {len(self.replaced)} of {blocks} blocks of {self.model}"]
        lines += _grouped(self.replaced)
        if self.already_fused:
            lines.append(f"  fused already: {_names(self.already_fused)}")
        lines += [f"  {line}" for line in self._not_fused()]
        if not blocks:
            lines.append(f"  {self.found()}")
        if self.replaced or self.already_fused:
            lines.append(f"  served by: {self.backend}")
        return "\n".join(lines)

    def found(self) -> str:
        """The blocks that were not fused, by reason; where there are none, the kinds that were looked for."""
        return "; ".join(self._not_fused()) or f"found none of {', '.join(KINDS[:-1])} and {KINDS[-1]}"

    def _not_fused(self) -> list[str]:
        lines = []
        for reason, names in _by_text(self.skipped).items():
            if reason.startswith(V1_BLOCK):
                plural = "" if len(names) == 1 else "s"
                kind = reason.replace(V1_BLOCK, V1_BLOCK + plural, 1)
                lines.append(f"found {len(names)} {kind}, not fused: {_names(names)}")
            else:
                lines.append(f"not fused: {reason}: {_names(names)}")
        return lines


def _by_text(entries: tuple[Replaced, ...] | tuple[Skipped, ...]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, text in entries:
        groups[text].append(name)
    return groups


def _grouped(entries: tuple[Replaced, ...] | tuple[Skipped, ...]) -> list[str]:
    return [f"  {text}: {_names(names)}" for text, names in _by_text(entries).items()]


def _names(names: list[str] | tuple[str, ...]) -> str:
    if len(names) <= 4:
        return ", ".join(name or "the model itself" for name in names)
    return f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)})"
