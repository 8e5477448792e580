"""results.json: written anew, atomically, whenever something is known, so that a kill loses nothing."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .setting import Setting, Skip, first_line, significant

NAME = "results.json"
CONTEXT_LOST = 75  # exit code of a stage's process whose CUDA context is broken: it has to be started anew
ERRORS, SKIPPED = "errors", "skipped"
_LOST = (
    "CUDA error",
    "an illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
)


class Results:
    """The JSON file. One process at a time writes: the runner waits while a stage's process runs."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.data: dict[str, Any] = {"stages": {}}
        self.reload()

    def reload(self) -> None:
        """Takes over what is on disk, if there is any; raises UserError where it is no such file."""
        if not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text()) if self.path.is_file() else None
            usable = isinstance(data, dict) and all(isinstance(stage, dict) for stage in data["stages"].values())
        except (OSError, ValueError, KeyError, AttributeError, RecursionError):
            usable = False
        if not usable:
            from convnextv2_kernels.errors import UserError  # late: a stage need not import PyTorch

            raise UserError(f"{self.path} holds no stages of an earlier run; give another --out")
        self.data = data

    def save(self, indent: int | None = None) -> None:
        temporary = self.path.with_name(f".{NAME}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.data, indent=indent) + "\n")
        temporary.replace(self.path)

    def stage(self, name: str) -> dict[str, Any]:
        return self.data["stages"].setdefault(name, {"status": "running", "result": {}})


class Recorder:
    """What a stage reports through: values, and cases of which one may fail without the others."""

    def __init__(self, results: Results, name: str, setting: Setting):
        self.results, self.name, self.setting = results, name, setting
        self._said = 0.0

    @property
    def result(self) -> dict[str, Any]:
        return self.results.stage(self.name).setdefault("result", {})

    def put(self, **values: Any) -> None:
        """Stores results of the stage by name."""
        self.result.update(significant(values))
        self.results.save()

    def say(self, text: str) -> None:
        """A progress line; at most one a second, so that the end of the output stays readable."""
        if time.monotonic() - self._said >= 1:
            self._said = time.monotonic()
            print(f"  {self.name}: {text}", flush=True)

    def done(self, group: str, key: str) -> bool:
        """Whether an earlier process of this stage has dealt with the case."""
        return any(key in self.result.get(kind, {}) for kind in (group, ERRORS, SKIPPED))

    def skip(self, key: str, reason: str) -> None:
        self.result.setdefault(SKIPPED, {})[key] = reason
        self.results.save()

    def case(self, group: str, key: str, run: Callable[[], Any], needs: float = 1.0, limit: float = 60.0) -> Any:
        """Runs one case and stores what it returns as ``result[group][key]``.

        An exception is stored instead, under "errors". If it broke the CUDA context the process ends with
        :data:`CONTEXT_LOST`, and after ``limit`` seconds it ends as well; the runner then starts a new process for the
        cases that are left.

        Args:
            needs: seconds that have to be left for it to be started.
            limit: seconds after which it counts as hung.
        """
        if self.done(group, key):
            return self.result.get(group, {}).get(key)
        if self.setting.remaining() < needs:
            self.skip(key, f"time: {self.setting.remaining():.0f} s left, {needs:.0f} s needed")
            return None
        self.say(key)
        self.results.stage(self.name)["running"] = key
        self.results.save()
        faulthandler.dump_traceback_later(max(1.0, limit), exit=True)
        try:
            value = significant(run())
            self.result.setdefault(group, {})[key] = value
            return value
        except Skip as reason:
            self.result.setdefault(SKIPPED, {})[key] = str(reason)
        except Exception as error:
            self.result.setdefault(ERRORS, {})[key] = describe(error)
            print(f"  {self.name}: FAILED {key}: {first_line(error, 160)}", flush=True)
            if context_lost(error):
                self._close()
                os._exit(CONTEXT_LOST)
        finally:
            self._close()
        return None

    def _close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.results.stage(self.name).pop("running", None)
        self.results.save()


def context_lost(error: BaseException) -> bool:
    """Whether nothing more can run on the GPU in this process. (After a failed capture, for one, it can.)"""
    if "out of memory" in str(error).lower():
        return False
    suspect = type(error).__name__ == "AcceleratorError" or any(text in str(error) for text in _LOST)
    return suspect and not _gpu_works()


def _gpu_works() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        return torch.ones(3, device="cuda").sum().item() == 3
    except RuntimeError:
        return False


def describe(error: BaseException) -> str:
    """The exception's first lines and where it was raised, short enough for the JSON."""
    lines = str(error).strip().splitlines()[:4]
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return (f"{type(error).__name__}: " + " | ".join(line.strip() for line in lines))[:500] + f" [{where}]"


def run_here(name: str, run: Callable[[Setting, Recorder], None], setting: Setting) -> int:
    """Runs a stage in this process; its exit code."""
    results = Results(setting.folder)
    stage = results.stage(name)
    try:
        run(setting, Recorder(results, name, setting))
        stage["status"] = "done"
        code = 0
    except Skip as reason:
        stage.update(status="skipped", reason=str(reason))
        code = 0
    except Exception as error:
        stage.update(status="failed", reason=first_line(error), traceback=traceback.format_exc()[-3000:])
        traceback.print_exc(file=sys.stdout)
        code = CONTEXT_LOST if context_lost(error) else 1
    results.save()
    return code
