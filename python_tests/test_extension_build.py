"""The build of the extension: ninja compiles what is out of date, and nothing else."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def setup_py(tmp_path, monkeypatch):
    """setup.py as a module whose root is a folder with two sources, one of which includes a header."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/one.cpp").write_text('#include "one.h"\nint one() { return ONE; }\n')
    (tmp_path / "src/one.h").write_text("#define ONE 1\n")
    (tmp_path / "src/two.cpp").write_text("int two() { return 2; }\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def build(setup_py, *flags, compiler=None):
    """Builds the library; returns which files are newer than before."""
    folder = setup_py.ROOT / "a folder $1"  # a name that needs quoting
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.[os]*")}
    ninja = setup_py.NinjaBuild(folder)
    for name in ("one", "two"):
        ninja.compile([*(compiler or ninja.compiler), "-fPIC", *flags], Path("src") / f"{name}.cpp")
    ninja.link([], folder / "library.so")
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.[os]*")}
    return sorted(path.name for path, time in after.items() if before.get(path) != time)


def test_only_what_is_out_of_date_is_built_again(setup_py):
    everything = ["library.so", "one.o", "two.o"]
    assert build(setup_py) == everything
    assert build(setup_py) == []
    (setup_py.ROOT / "src/one.h").write_text("#define ONE 11\n")
    assert build(setup_py) == ["library.so", "one.o"]
    assert build(setup_py, "-DVALUE=$HOME 'quoted'") == everything
    assert build(setup_py, "-DVALUE=$HOME 'quoted'") == []


def test_another_version_of_the_compiler_builds_again(setup_py):
    compiler = setup_py.ROOT / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    assert len(build(setup_py, compiler=[str(compiler)])) == 3
    assert build(setup_py, compiler=[str(compiler)]) == []
    later = compiler.stat().st_mtime + 10
    os.utime(compiler, (later, later))
    assert {"one.o", "two.o"} <= set(build(setup_py, compiler=[str(compiler)]))


def test_a_failed_compilation_ends_the_build_with_the_compilers_message(setup_py, capfd):
    (setup_py.ROOT / "src/two.cpp").write_text("int two() { return undeclared; }\n")
    with pytest.raises(SystemExit, match=r"building library\.so failed; the compiler's message is above"):
        build(setup_py)
    assert "undeclared" in "".join(capfd.readouterr())


def test_a_build_without_ninja_says_what_to_install(setup_py, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ninja", None)
    with pytest.raises(SystemExit, match="needs ninja, which is not installed here"):
        build(setup_py)
