"""The pytest suite's CUDA part, then its Triton part, in subprocesses; their JUnit reports become JSON."""

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

SHARED = ("python_tests/test_schedule.py", "python_tests/conformance")
# by what the names of the tests contain, in order; Triton compiles at first use and gets what time is left
PARTS = {"cuda": ("python_tests/backends/cuda", *SHARED), "triton": ("python_tests/backends/triton", *SHARED)}
DRY_PARTS = {"cuda": ("python_tests/backends/cuda/test_layout_kernels.py",)}
# these compile, which needs time and no GPU
LEFT_OUT = (
    "python_tests/backends/cuda/test_resources.py",
    "python_tests/backends/cuda/test_build.py",
    "python_tests/backends/triton/test_resources.py",
)
MAX_NAMED = 40
LEAST = 30  # seconds kept for each later part


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def command(report: Path, dry_run: bool, part: str = "cuda") -> tuple[list[str], list[str]]:
    """pytest's command line, and notes on what it does without."""
    notes = []
    result = [sys.executable, "-m", "pytest", *(DRY_PARTS if dry_run else PARTS)[part]]
    # addopts of pyproject.toml name an option of pytest-benchmark, which may not be there
    result += ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", part, f"--maxfail={MAX_NAMED}"]
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
    (setting.folder / "tests.log").unlink(missing_ok=True)
    parts = list(DRY_PARTS if setting.dry_run else PARTS)
    counts: dict[str, int] = {}
    failing: dict[str, str] = {}
    unreported = []
    for index, part in enumerate(parts):
        limit = setting.remaining() - 15 - LEAST * (len(parts) - index - 1)
        reason = why_not(part, setting)
        if reason is not None or limit < 5:
            recorder.skip(f"{part} tests", reason or f"time: {limit:.0f} s left")
            continue
        found = run_part(part, limit, setting, recorder)
        if found is None:
            unreported.append(part)
            continue
        counts = {kind: counts.get(kind, 0) + number for kind, number in found["counts"].items()}
        failing |= found["failing"]
        recorder.put(counts=counts, failing=failing)
    if unreported:
        raise RuntimeError(f"pytest left no report of {' and '.join(unreported)}")
    if counts.get("failed") or counts.get("error"):
        raise RuntimeError(f"{counts['failed']} tests failed, {counts['error']} could not be run")


def why_not(part: str, setting: Setting) -> str | None:
    """Why a part cannot run, or None; CUDA's tests are those the build was made for."""
    if part == "cuda" or setting.dry_run:
        return None
    from convnextv2_kernels.backends import triton

    return triton.load_error()


def run_part(part: str, limit: float, setting: Setting, recorder: Recorder) -> dict | None:
    """Runs the tests of a part for at most ``limit`` seconds; what :func:`parse` finds, None without a report."""
    log, report = setting.folder / "tests.log", setting.folder / "junit.xml"
    report.unlink(missing_ok=True)
    line, notes = command(report, setting.dry_run, part)
    # at an interrupt pytest still writes its report, of the tests so far
    code = run_logged(line, log, setting, limit, signal.SIGINT)
    about = {"command": " ".join(line[2:]).replace(str(setting.folder), "DIR"), "notes": notes, "exit_code": code}
    if code is None:
        about["incomplete"] = f"{part}: stopped after {limit:.0f} s"
        recorder.put(incomplete="; ".join(filter(None, (recorder.result.get("incomplete"), about["incomplete"]))))
    found = parse(report) if report.exists() else None
    if found is None or code not in (0, 1, None):
        about["log_tail"] = log.read_text(errors="replace").splitlines()[-10:]
    report.unlink(missing_ok=True)
    about["counts"] = found and found["counts"]
    recorder.put(parts={**recorder.result.get("parts", {}), part: about})
    return found
