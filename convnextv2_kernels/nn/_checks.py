"""Argument checks shared by the modules."""

from __future__ import annotations

from .. import backends

SCOPES = ("image", "batch")


def check_positive(name: str, value: int) -> int:
    """``value`` if it is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def check_scope(scope: str, name: str = "scope") -> str:
    """``scope`` if it names a GRN scope."""
    if scope not in SCOPES:
        raise ValueError(f"{name} must be 'image' or 'batch', got {scope!r}")
    return scope


def check_drop_path(rate: float, name: str = "drop_path") -> float:
    """``rate`` if it is a probability below 1: at 1 nothing is kept and the kept scale is
    infinite."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {rate!r}")
    return float(rate)


def check_reference(what: str) -> None:
    """A forced backend other than the reference is an error for what only the reference has."""
    if backends.forced() not in ("auto", "reference"):
        raise RuntimeError(f"{what} was asked of backend '{backends.forced()}', but only the reference has it")
