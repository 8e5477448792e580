"""Going on with a result file: only where it was measured in the same way on the same machine."""

from __future__ import annotations

import json
from pathlib import Path

# What figures of one file must have in common.
SAME = ("cpu", "gpu", "threads", "torch", "package", "environment", "backends")


class ResumeError(RuntimeError):
    """The result file there is cannot be gone on with, or no file can be written."""


def resume(path: Path, kind: str, parameters: dict, machine: dict, restart: bool) -> dict:
    """The result at ``path`` to go on with, or a new one: ``{"kind", "machine", "parameters"}``.

    Makes the folder. Raises ResumeError, in one sentence, where the folder cannot be made, or the file there is
    another kind of result, has other parameters or comes from another machine.
    """
    new = {"kind": kind, "machine": machine, "parameters": parameters}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() and not restart else None
    except OSError as error:
        raise ResumeError(f"--output {path.parent} cannot be used: {error}") from error
    if text is None:
        return new
    way_out = "; give another --output, or --restart to begin a new file"
    try:
        old = json.loads(text)
        if old["kind"] != kind:
            raise ResumeError(f"{path} is a result of kind {old['kind']!r}, expected {kind!r}{way_out}")
        pairs = {key: (old["parameters"].get(key), value) for key, value in parameters.items()}
        pairs |= {key: (old["machine"].get(key), machine.get(key)) for key in SAME}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{path} is no result of this benchmark{way_out}") from error
    for key, (before, now) in pairs.items():
        if before != now:
            raise ResumeError(f"{path} was measured with {key} {before!r}, this run has {now!r}{way_out}")
    return old
