"""Instructions that the C++ CPU kernels execute, counted by callgrind on ``csrc/bench/instructions.cpp``."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .. import ROOT

FUNCTION = "cnx_counted_call"
# First word of the driver's lines: the section of the result.
SECTIONS = {"call": "instructions", "call-c-library": "instructions_c_library"}
BUILD_SECONDS = 3600
COUNT_SECONDS = 600


class Unavailable(RuntimeError):
    """Instructions cannot be counted on this machine."""


def valgrind_version() -> str:
    """Version of valgrind; raises Unavailable where it is not installed or does not run."""
    if shutil.which("valgrind") is None:
        raise Unavailable("valgrind is not installed")
    done = _finished(["valgrind", "--version"], 60)
    if done.returncode:
        raise Unavailable(f"valgrind does not run: {_last_line(done.stderr)}")
    return done.stdout.strip()


def build(folder: Path) -> Path:
    """Build the driver in a build folder of CMake and return its path; up to date already, nothing is compiled.

    Raises:
        Unavailable: there is no CMake. RuntimeError: the build failed.
    """
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join([own, os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise Unavailable("cmake, which builds the driver, is not installed")
    if not (folder / "CMakeCache.txt").exists():
        ninja = shutil.which("ninja", path=path)
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        _run([cmake, "-S", str(ROOT), "-B", str(folder), *generator], BUILD_SECONDS)
    _run([cmake, "--build", str(folder), "--target", "instructions", "-j2"], BUILD_SECONDS)
    return folder / "instructions"


def count(driver: Path) -> tuple[dict[str, str], dict[str, dict[str, dict[str, int]]]]:
    """Run the driver under callgrind.

    valgrind 3.19 knows no AVX-512, so on x86-64 the AVX2 kernels are counted; both are compiled from the same source.

    Returns:
        What the counts depend on: ``compiler``, ``isa``, ``c_library``, ``valgrind``; and by section and call
        ``{"instructions": number}``.

    Raises:
        Unavailable: the processor or valgrind lacks the instruction set. RuntimeError: the driver is no optimized
        build, failed, or was not counted call by call.
    """
    isa = "avx2" if platform.machine().lower() in ("x86_64", "amd64") else "baseline"
    facts = {"valgrind": valgrind_version(), "c_library": " ".join(platform.libc_ver())}
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--quiet", "--tool=callgrind", "--collect-atstart=no"]
        command += [f"--toggle-collect={FUNCTION}", f"--dump-after={FUNCTION}"]
        command += [f"--callgrind-out-file={folder}/part", str(driver), isa]
        # of the environment nothing that could choose other functions of the C library
        done = _finished(command, COUNT_SECONDS, {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"})
        if done.returncode == 2:
            raise Unavailable(f"the driver cannot run here: {_last_line(done.stderr)}")
        if done.returncode:
            said = _last_line(done.stderr)
            raise RuntimeError(f"{driver.name} under valgrind ended with code {done.returncode}: {said}")
        parts = {int(path.suffix[1:]): path.read_text() for path in Path(folder).glob("part.*")}
    return _assembled(done.stdout, [_summary(parts[number]) for number in sorted(parts)], facts)


def _assembled(output: str, totals: list[int], facts: dict[str, str]) -> tuple[dict[str, str], dict]:
    calls: list[tuple[str, str]] = []
    for line in output.splitlines():
        word, _, rest = line.partition(" ")
        if word in SECTIONS:
            calls.append((SECTIONS[word], rest))
        else:
            facts[word] = rest
    if facts.pop("build", None) != "optimized":
        raise RuntimeError("the driver was built without optimization or with a sanitizer, expected a Release build")
    if not calls or len(totals) != len(calls) or len(set(calls)) != len(calls) or 0 in totals:
        raise RuntimeError(f"callgrind counted {len(totals)} calls and the driver made {len(calls)}, expected the same")
    sections: dict[str, dict[str, dict[str, int]]] = {name: {} for name in SECTIONS.values()}
    for (section, name), total in zip(calls, totals, strict=True):
        sections[section][name] = {"instructions": total}
    return facts, sections


def _summary(part: str) -> int:
    found = re.search(r"^summary: (\d+)$", part, re.MULTILINE)
    return int(found[1]) if found else 0


def _run(command: list[str], seconds: float) -> None:
    done = _finished(command, seconds)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _finished(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} was not done after {seconds:.0f} s") from error


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]
