"""Runs the stages in order, each in its own process: a broken CUDA context or a hang costs one case, not the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import ROOT
from .results import CONTEXT_LOST, ERRORS, Results
from .setting import Setting

RESTARTS = 8  # processes of one stage after the first
GRACE = 8.0  # seconds a stage has beyond its time to end by itself


@dataclass(frozen=True)
class Stage:
    """Attributes:
    module: has ``run(setting, recorder)``.
    needs: seconds that have to be left for it to be started.
    most: seconds it may take.
    """

    name: str
    module: str
    needs: float
    most: float
    about: str = ""


def run_stages(stages: Sequence[Stage], setting: Setting, reserve: float = 12.0) -> Results:
    """Runs the stages, the last of which has ``reserve`` seconds kept for it."""
    results = Results(setting.folder)
    for stage in stages:
        kept = 0.0 if stage is stages[-1] else reserve
        left = setting.remaining() - kept
        if left < stage.needs:
            reason = f"time: {left:.0f} s left, {stage.needs:.0f} s needed"
            results.data["stages"][stage.name] = {"status": "skipped", "reason": reason, "result": {}}
            results.save()
            print(f"[{stage.name}] skipped: {reason}", flush=True)
            continue
        results.data["stages"][stage.name] = {"status": "running", "result": {}}
        results.save()
        _run_stage(stage, replace(setting, deadline=time.time() + min(left, stage.most)), results)
    return results


def _run_stage(stage: Stage, setting: Setting, results: Results) -> None:
    start = time.monotonic()
    print(f"[{stage.name}] at most {setting.remaining():.0f} s {stage.about}", flush=True)
    restarts = 0
    while True:
        code = _run_process(stage, setting)
        results.reload()
        record = results.stage(stage.name)
        hung = record.pop("running", None)
        if hung is not None:
            ended = "time was up" if code is None else f"the process ended with code {code} (crash, or a hang)"
            record["result"].setdefault(ERRORS, {})[hung] = f"{ended} during this case"
        restartable = code == CONTEXT_LOST or (hung is not None and code not in (0, None))
        if code == 0 or not restartable or restarts == RESTARTS or setting.remaining() < stage.needs:
            break
        restarts += 1
        record["status"] = "running"
        results.save()
    _close(record, code, restarts)
    record["seconds"] = round(time.monotonic() - start, 1)
    results.save()
    print(f"[{stage.name}] {record['status']} after {record['seconds']} s {record.get('reason', '')}", flush=True)


def _close(record: dict, code: int | None, restarts: int) -> None:
    if restarts:
        record["restarts"] = restarts
    if record["status"] == "running":
        record["status"] = "failed"
        record["reason"] = "stopped: its time was up" if code is None else f"its process ended with code {code}"


def _run_process(stage: Stage, setting: Setting) -> int | None:
    """Exit code of the stage's process; None where it had to be ended."""
    command = [sys.executable, "-m", "bench", "gpu", "--child", stage.module, "--stage", stage.name]
    command += ["--setting", setting.to_json()]
    process = subprocess.Popen(command, env=setting.environment(), cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, setting.remaining()) + GRACE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a process started in a session of its own, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_logged(
    command: Sequence[str], log: Path, setting: Setting, limit: float, stop=signal.SIGKILL, **more: str
) -> int | None:
    """Runs a command with its output appended to ``log``; its exit code, None where it took longer than ``limit``.

    It is stopped by the signal ``stop`` and, ten seconds later, killed.
    """
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=setting.environment(**more),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            process.send_signal(stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            return None
        finally:
            end(process)
