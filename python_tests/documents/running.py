"""Runs documented commands in a copy of what a clone of the repository holds, one copy for each document.

The package's own command line, `python -m bench` and the examples run in this process, as importing PyTorch
takes longer than most of them; everything else in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from convnextv2_kernels import cli

from .commands import Command
from .files import FILES

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # of one command, on a machine that has other work too
CLONED = ("README.md", "Makefile", "pyproject.toml", "bench", "docs", "examples", "python_tests")
PACKAGE = ["-m", "convnextv2_kernels"]
MAINTAINER = ["-m", "bench"]
DEFAULT_OUTPUT = {"bench": "bench_output", "analyze": "analysis_output"}


@dataclass(frozen=True)
class Run:
    """A command runs as it stands, but with words replaced (``put``) and options appended (``more``)."""

    more: str = ""
    put: Mapping[str, str] = field(default_factory=dict)
    process: bool = False  # of its own, although it could run in this one
    thorough: bool = False  # left out of the short selection


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    words: list[str]
    code: int
    out: str
    err: str
    wrote: bool = True  # into what `output_of` says, where it says something

    def __str__(self) -> str:
        return f"{shlex.join(self.words)}\nended with code {self.code}\n{self.out[-1500:]}\n{self.err[-3000:]}"


class Clone:
    """The working folder of one document's commands."""

    def __init__(self, folder: Path, commands: list[Command], table: Mapping[str, Run]):
        self.folder, self.commands, self.table, self.done = folder, commands, table, {}
        for name in CLONED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder / name)

    def run(self, command: Command) -> Done:
        """Run it once, after what it builds on: earlier commands of the document into whose ``--output`` it looks."""
        if command.text not in self.done:
            entry = self.table[command.text]
            words = [entry.put.get(word, word) for word in command.words]
            for word in words:
                self._provide(word, command)
            words += shlex.split(entry.more)
            output = self.folder / (output_of(words) or "no such place")
            before = _state_of(output)
            done = run(words, self.folder, entry)
            wrote = output_of(words) is None or _state_of(output) != before
            self.done[command.text] = replace(done, wrote=wrote)
        return self.done[command.text]

    def _provide(self, word: str, command: Command) -> None:
        for earlier in self.commands:
            if earlier.line >= command.line:
                break
            output = output_of(earlier.words)
            if output and word.startswith(output + "/") and earlier.text in self.table:
                done = self.run(earlier)
                assert done.code == 0, f"{command.place} needs what {earlier.place} makes, but {done}"
                return
        if word in FILES and not (self.folder / word).exists():
            (self.folder / word).parent.mkdir(parents=True, exist_ok=True)
            FILES[word](self.folder / word)


def output_of(words: list[str]) -> str | None:
    """What a command writes to: the last place it names, or its program's own."""
    places = [after for word, after in itertools.pairwise(words) if word in ("--output", "--out")]
    if places:
        return places[-1]
    mode = words[3] if len(words) > 3 else None
    if words[1:3] == MAINTAINER:
        return DEFAULT_OUTPUT["bench"] if mode in ("ops", "scaling") else None
    return DEFAULT_OUTPUT.get(mode) if words[1:3] == PACKAGE else None


def _state_of(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [place, *place.rglob("*")] if path.is_file()}


def run(words: list[str], folder: Path, entry: Run | None = None) -> Done:
    """Run a command in a folder."""
    entry = entry or Run()
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words[0].partition("=")
        words = words[1:]
    # a test run that a command starts is no part of this one
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    python = words[0] in ("python", "python3")
    if python and words[1:3] == PACKAGE and not (entry.process or variables):
        return _here(words, folder, lambda: cli.main(words[3:]))
    if python and words[1:3] == MAINTAINER and not (entry.process or variables):
        return _here(words, folder, lambda: _bench(folder, words[3:]))
    if python and words[1].startswith("examples/") and not (entry.process or variables):
        return _here(words, folder, lambda: _script(folder / words[1], words[1:]))
    if words[0] == "torchrun":  # two processes on one machine, whatever the number; a free port
        start = ["-m", "torch.distributed.run", "--standalone", *words[1:]]
        start[start.index("--nproc-per-node") + 1] = "2"
    else:
        start = words[1:] if python else ["-m", *words]
    return _process(words, start, folder, env)


def _process(words: list[str], start: list[str], folder: Path, env: Mapping[str, str]) -> Done:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, *start], cwd=folder, env=env, **pipes) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too
            out, err = process.communicate()
            return Done(words, 124, out, f"{err}\nthe command took more than {SECONDS} s")
    return Done(words, process.returncode, out, err)


def _bench(folder: Path, words: list[str]) -> int:
    """The clone's own bench, whichever other was imported before."""
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "bench"}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("bench.__main__").main(words)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
            del sys.modules[name]
        sys.modules.update(others)


def _script(path: Path, words: list[str]) -> None:
    sys.argv = words
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def _here(words: list[str], folder: Path, start) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with _kept_state(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _time_limit():
        try:
            code = start() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(end.code)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            err.write(traceback.format_exc())
            code = 1
    return Done(words, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _kept_state(folder: Path) -> Iterator[None]:
    """What a program of its own process may change: put back, and modules from beside it forgotten."""
    places = tuple(str(folder / name) for name in ("bench", "examples", "python_tests"))
    known = set(sys.modules)
    before = Path.cwd(), sys.argv, list(sys.path), dict(os.environ), torch.get_num_threads()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.argv, sys.path[:] = before[1], before[2]
        os.environ.clear()
        os.environ.update(before[3])
        torch.set_num_threads(before[4])
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(places):
                del sys.modules[name]


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """TimeoutError after SECONDS; where there is no alarm, none."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"the command took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
