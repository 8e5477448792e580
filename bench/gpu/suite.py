"""The pytest suite's CUDA part in a subprocess; its JUnit report becomes JSON."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .results import Recorder
from .runner import run_logged
from .setting import Setting, Skip, first_line

PATHS = ("python_tests/cuda", "python_tests/test_schedule.py", "python_tests/conformance")
# these compile, which needs time and no GPU
LEFT_OUT = ("python_tests/cuda/test_resources.py", "python_tests/cuda/test_build.py")
MAX_NAMED = 40


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def command(report: Path, dry_run: bool) -> tuple[list[str], list[str]]:
    """pytest's command line, and notes on what it does without."""
    notes = []
    result = [sys.executable, "-m", "pytest", *(PATHS if not dry_run else ["python_tests/cuda/test_layout_kernels.py"])]
    # addopts of pyproject.toml name an option of pytest-benchmark, which may not be there
    result += ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", "cuda", f"--maxfail={MAX_NAMED}"]
    result += ["-rfE", "--tb=short", f"--junitxml={report}", "-o", "junit_logging=no"]
    result += [f"--ignore={path}" for path in LEFT_OUT]
    if has("pytest_timeout"):
        result += ["--timeout=90"]
    else:
        notes.append("pytest-timeout is not installed: a test that hangs stops the suite")
    if has("xdist") and not dry_run:
        result += ["-n", str(max(2, min(12, (os.cpu_count() or 4) - 2)))]
    elif not dry_run:
        notes.append("pytest-xdist is not installed: one test at a time")
    return result, notes


def parse(report: Path) -> dict:
    """Counts, and the names of failing tests with the first line of their errors."""
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    failing = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        outcome = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        counts["failed" if outcome == "failure" else outcome] += 1
        if outcome in ("failure", "error") and len(failing) < MAX_NAMED:
            name = f"{case.get('classname', '').replace('python_tests.', '')}::{case.get('name')}"
            failing[name] = first_line(kinds[outcome].get("message") or kinds[outcome].text or "", 240).split("\n")[0]
    return {"counts": counts, "failing": failing}


def run(setting: Setting, recorder: Recorder) -> None:
    missing = [name for name in ("pytest", "hypothesis") if not has(name)]
    if missing:
        raise Skip(f"not installed: {', '.join(missing)}")
    log, report = setting.folder / "tests.log", setting.folder / "junit.xml"
    for path in (log, report):
        path.unlink(missing_ok=True)
    line, notes = command(report, setting.dry_run)
    limit = setting.remaining() - 15
    # at an interrupt pytest still writes its report, of the tests so far
    code = run_logged(line, log, setting, limit, signal.SIGINT)
    recorder.put(command=" ".join(line[2:]).replace(str(setting.folder), "DIR"), notes=notes, exit_code=code)
    if code is None:
        recorder.put(incomplete=f"stopped after {limit:.0f} s")
    if not report.exists():
        recorder.put(log_tail=log.read_text(errors="replace").splitlines()[-10:])
        raise RuntimeError("pytest left no report")
    found = parse(report)
    recorder.put(**found)
    report.unlink()
    if code not in (0, 1, None):
        recorder.put(log_tail=log.read_text(errors="replace").splitlines()[-10:])
    counts = found["counts"]
    if counts["failed"] or counts["error"]:
        raise RuntimeError(f"{counts['failed']} tests failed, {counts['error']} could not be run")
