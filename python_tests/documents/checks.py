"""Checks of documented commands that a test cannot run: as much as possible without running them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement

from .commands import Command
from .running import ROOT, Done, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

Check = Callable[[Command], None]


def make_target(command: Command) -> None:
    """make knows the target, and how to make all that it needs."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.strip(), f"{command.place}: {done.stderr}"


def pip_requirements(command: Command) -> None:
    """pip knows the options; the requirements parse and allow what pyproject.toml asks for; it has the extras.

    This project is installed editable: otherwise the clone, from which ``python -m`` imports, has no extension."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = {**project["project"]["optional-dependencies"], "": project["project"]["dependencies"]}
    asked = {r.name: r for r in map(Requirement, [*extras[""], *project["build-system"]["requires"]])}
    pip, install, *words = command.words
    assert (pip, install) == ("pip", "install"), command.place
    known = run(["python", "-m", "pip", "install", "--help"], ROOT).out
    for before, word in zip([install, *words], words, strict=False):
        if word.startswith("-"):
            assert re.search(rf"{word}[, ]", known), f"{command.place}: pip install has no option {word}"
        elif word == "." or word.startswith(".["):
            assert before == "-e" and "--no-build-isolation" in words, f"{command.place}: `{command.text}`"
            for extra in Requirement("this" + word[1:]).extras or {""}:
                assert extra in extras, f"{command.place}: pyproject.toml has no extra {extra!r}"
                assert all(map(Requirement, extras[extra])), extra
        else:
            given = Requirement(word)
            wanted = asked.get(given.name)
            for pinned in given.specifier if wanted else ():
                assert wanted.specifier.contains(pinned.version), f"{command.place}: {word}, but it takes {wanted}"


def build_requirements(command: Command) -> None:
    """The command names everything that a build without isolation needs."""
    pip_requirements(command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = {Requirement(word).name for word in command.words[2:]}
    needed = {Requirement(text).name for text in project["build-system"]["requires"]}
    assert named == needed, f"{command.place}: names {sorted(named)}, building needs {sorted(needed)}"


def options(command: Command) -> None:
    """The program's help lists each option, and its parser takes the values before it comes to --help."""
    done = run([*command.words, "--help"], ROOT)
    assert done.code == 0, f"{command.place}: {done}"
    for word in command.words:
        if word.startswith("--"):
            assert word.partition("=")[0] in done.out.replace(",", " ").split(), f"{command.place}: no option {word}"


def collected(command: Command) -> None:
    """The files that pytest is given hold tests."""
    for word in command.words[1:]:
        path = ROOT / word
        assert path.is_file() and "\ndef test_" in path.read_text(), f"{command.place}: {word} holds no tests"


def _mode(command: Command) -> ModuleType:
    """The module of `python -m bench MODE`."""
    from bench.__main__ import MODES

    return importlib.import_module(f"bench.{MODES[command.words[3]][0]}")


def parsed_by(function: str) -> Check:
    """A function of the program takes all of its arguments; it ends the process where they make no sense."""

    def check(command: Command) -> None:
        options(command)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CONVNEXTV2_KERNELS_CUDA_EMULATION", raising=False)  # refused without --dry-run
            assert getattr(_mode(command), function)(command.words[4:]) is not None

    return check


def options_and_those_of(**commands: str) -> Check:
    """The same, and constants of the program hold options of commands of the package that it starts."""

    def check(command: Command) -> None:
        options(command)
        program = vars(_mode(command))
        for name, subcommand in commands.items():
            started = f"python -m convnextv2_kernels {subcommand} {program[name]}"
            options(Command(command.document, command.line, started, started))

    return check


def refused(sentence: str) -> Check:
    """Without a GPU the program accepts the arguments and then says that it needs one."""

    def check(command: Command) -> None:
        options(command)
        if not torch.cuda.is_available():
            done: Done = run(command.words, ROOT)
            assert done.code == 1 and sentence in done.err, f"{command.place}: {done}"

    return check
