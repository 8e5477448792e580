"""Result files: one format, a reader that brings older files into it, and resuming a file that is not complete.

``{"format": 2, "kind", "machine", "parameters", "allocator", ...}``; what was timed is ``variants``, by name, with the
``control`` beside them. Files of format 1 say ``arms`` and ``gate``, name no kind in places, and have no control.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._console import visible
from .._files import atomic_file, read_json
from ..errors import FileError, UserError
from . import allocator, machine

FORMAT = 2
# Kinds, and what a file of each has besides the format.
KINDS = {
    "step": ("machine", "parameters", "step"),
    "figure6": ("machine", "parameters", "sizes", "left_out"),
    "ops": ("machine", "parameters", "ops"),
    "scaling": ("machine", "parameters", "series"),
    "fused": ("machine", "parameters", "step"),
    "composed": ("rows",),
    "cpu_choices": ("machine",),
    "regression_gate": ("machine", "software", "parameters"),
    "cuda_resources": ("nvcc", "kernels"),
    "triton_resources": ("triton", "kernels"),
    "training": ("machine", "cosine"),
    "gpu_check": ("stages",),
}
# Kinds whose times are compared, and that say how the allocator was.
TIMED = ("step", "figure6", "ops", "scaling", "fused", "composed", "cpu_choices")
# Kinds whose parts are lists of what was measured.
_LISTS = ("step", "figure6", "ops", "scaling", "fused")
# What figures of one file must have in common.
SAME = ("cpu", "gpu", "threads", "torch", "package", "environment", "backends")


class NotAResult(UserError):
    """A file that holds no result of this benchmark; the message is one sentence."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message, code)


class ResumeError(UserError):
    """The result file there is cannot be resumed, or no file can be written."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message, code)


def new(kind: str, parameters: Mapping[str, Any], description: dict, mode: str) -> dict:
    """The head of a result; ``mode`` is that of the allocator."""
    return {
        "format": FORMAT,
        "kind": kind,
        "machine": description,
        "parameters": {**parameters, "allocator": mode},
        "allocator": allocator.describe(mode),
    }


def describe_run(kind: str, parameters: Mapping[str, Any], mode: str, device: str = "cpu") -> dict:
    """:func:`new` on this machine, as it is now."""
    return new(kind, parameters, machine.describe(device), mode)


def write(path: Path, result: dict) -> None:
    """Write the JSON atomically, each list of samples on one line."""
    text = json.dumps(result, indent=2, allow_nan=False)
    text = re.sub(r"\[[-+\d.eE,\s]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    with atomic_file(path) as file:
        file.write((text + "\n").encode())


def read(path: Path) -> dict:
    """A result file in today's format; raises NotAResult where it is missing, no JSON, or something else.

    Characters that would steer a terminal, or that no encoding has, are escaped in all texts.
    """
    try:
        result = read_json(path)
    except OSError as error:
        raise NotAResult(visible(f"{path} cannot be read: {error.strerror}")) from error
    except FileError as error:
        raise NotAResult(visible(str(error))) from error
    with reading(path):
        return upgraded(escaped(result))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, parts of a result are read that may be anything; raises NotAResult where they are not as expected."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        reason = str(error) if type(error) is ValueError else f"of whose parts one is missing or another: {error!r}"
        raise NotAResult(visible(f"{path} is not a result of this benchmark, {reason}")) from error


def escaped(value: Any) -> Any:
    """A value of JSON in whose texts nothing but printable characters and newlines is left; raises ValueError where a
    number is not finite, which nobody could write again."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected finite numbers, found {value}")
    if isinstance(value, str):
        return value if value.isprintable() else "\n".join(map(visible, value.split("\n")))
    if isinstance(value, dict):
        return {escaped(key): escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


def upgraded(result: Any) -> dict:
    """A result of any format in today's; raises ValueError where it is none."""
    if not isinstance(result, dict):
        raise ValueError("expected an object")
    _require_controls(result)
    kind = _kind_of(result)
    missing = [name for name in KINDS[kind] if name not in result]
    if missing:
        raise ValueError(f"expected the keys {', '.join(missing)} in a result of kind {kind!r}")
    for name in ("machine", "parameters", "allocator"):
        if not isinstance(result.get(name, {}), dict):
            raise ValueError(f"expected an object under {name!r}")
    for name in ("step", "sizes", "series"):
        if kind in _LISTS and name in result and not _is_list_of_objects(result[name]):
            raise ValueError(f"expected a list of objects under {name!r}")
    if result.get("format") == FORMAT:
        return result
    if kind in _LISTS:
        result = _renamed(result)
        if kind in ("step", "ops"):
            result = {**result, "step": [_with_ratios(step) for step in result["step"]]}
    if kind == "cpu_choices":
        parts = {part: result[part] for part in ("save", "chunk") if part in result}
        result = {**result, **{k: {m: {"variants": v} for m, v in part.items()} for k, part in parts.items()}}
    head: dict[str, Any] = {"format": FORMAT, "kind": kind}
    if kind in TIMED:
        head["allocator"] = _allocator_of(result["machine"])
        result = {**result, "parameters": {**result.get("parameters", {}), "allocator": head["allocator"]["mode"]}}
    return {**result, **head}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _require_controls(value: Any) -> None:
    """Controls are read wherever they are."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            _require_controls(item)
    control = value.get("control") if isinstance(value, dict) else None
    if isinstance(control, dict) and not _is_control(control):
        raise ValueError("expected of, ratio, tolerance and valid under 'control'")


def _is_control(value: dict) -> bool:
    number = (int, float)
    if not (type(value.get("valid")) is bool and isinstance(value.get("of"), str) and "ratio" in value):
        return False
    if value["ratio"] is None:
        return value["valid"] or isinstance(value.get("reason"), str)
    return type(value["ratio"]) in number and type(value.get("tolerance")) in number


def _kind_of(result: Mapping[str, Any]) -> str:
    kind = result.get("kind")
    if not isinstance(kind, str | None):
        raise ValueError(f"expected a text under 'kind', found a {type(kind).__name__}")
    if kind == "bench":  # format 1, which had both in one file
        return "step" if result.get("step") else "ops"
    if kind in KINDS:
        return kind
    if kind is None:
        if "libraries" in (result.get("parameters") or {}):
            return "fused"
        for key, inferred in (
            ("products", "cpu_choices"),
            ("nvcc", "cuda_resources"),
            ("triton", "triton_resources"),
            ("cosine", "training"),
            ("stages", "gpu_check"),
        ):
            if key in result:
                return inferred
    raise ValueError(f"expected a kind of {', '.join(KINDS)}, found {kind!r}")


def _renamed(value: Any) -> Any:
    """Format 1 under today's keys: variants, correctness, and of each variant its baseline and execution."""
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {{"arms": "variants", "gate": "correctness"}.get(key, key): _renamed(item) for key, item in value.items()}
    if "variant" in found:
        written = found.pop("variant")
        compiled = written is not None and written.pop("compiled")
        found |= {"baseline": written, "execution": "compile" if compiled else "eager"}
    return found


def _with_ratios(step: dict) -> dict:
    names = {"fastest_dense": "fastest_dense", "time_ratio": "throughput"}
    names |= {"frugal_dense": "frugal_dense", "saved_ratio": "saved"}
    return {**step, "ratios": {new: step[old] for old, new in names.items() if old in step}}


def _allocator_of(description: Mapping[str, Any]) -> dict:
    """What a file of format 1 tells of it: the environment."""
    given = description.get("environment") or {}
    set_ = {name: given[name] for name in allocator.VARIABLES if name in given}
    constant = len(set_) == len(allocator.VARIABLES)
    blocks = "kept" if constant else "unknown"
    mode = "constant" if constant else "default"
    return {"mode": mode, "library": "unknown", "large_blocks": blocks, "environment": set_}


def resume(path: Path, start: dict, restart: bool) -> dict:
    """The result at ``path`` to resume, or ``start``, the head of a new one.

    Makes the folder. Raises ResumeError, in one sentence, where the folder cannot be made, or the file there is
    another kind of result, has other parameters or comes from another machine.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.exists() and not restart
    except OSError as error:
        raise ResumeError(f"--output {path.parent} cannot be used: {error}") from error
    if not found:
        return start
    way_out = "; give another --output, or --restart to begin a new file"
    try:
        old = read(path)
        if old["kind"] != start["kind"]:
            raise ResumeError(f"{path} is a result of kind {old['kind']!r}, expected {start['kind']!r}{way_out}")
        now = escaped(json.loads(json.dumps(start)))
        pairs = {key: (old["parameters"].get(key), value) for key, value in now["parameters"].items()}
        pairs |= {key: (old["machine"].get(key), now["machine"].get(key)) for key in SAME}
    except NotAResult as error:
        raise ResumeError(f"{error}{way_out}") from error
    for key, (before, now) in pairs.items():
        if before != now:
            raise ResumeError(f"{path} was measured with {key} {before!r}, this run has {now!r}{way_out}")
    return old
