"""The C++ tree: structs of parameters are filled by name, sources and architectures are listed once."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from bench import kernel_resources

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh"))
# headers whose structs are filled by name: those of the C++ API, and those of several pointers within it
HEADERS = ("include/cnx/params.h", "include/cnx/cuda.h")
HEADERS += ("cuda/norm/rows.cuh", "cuda/norm/rows_grad.cuh", "cuda/conv/grad_plan.h")
MEMBERS = {"geometry": "ConvGeometry", "segments": "Segments"}


@functools.cache
def structs() -> set[str]:
    """Names of the structs with three members or more."""
    found = set()
    for header in HEADERS:
        for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", (CSRC / header).read_text(), re.DOTALL):
            members = re.sub(r"//.*", "", body).split("CNX_HOST_DEVICE")[0]
            if len(re.findall(r"[;,]", members)) >= 3 and "operator()" not in members:
                found.add(name)
    return found


@functools.cache
def kernels() -> set[str]:
    """Functions whose first argument is such a struct."""
    listed = "".join((CSRC / "include" / "cnx" / name).read_text() for name in ("cpu.h", "cuda.h"))
    passes = re.findall(r"^void (\w+)\(", (CSRC / "cuda/mlp/row_passes.h").read_text(), re.MULTILINE)
    return {*re.findall(r"^  K\((\w+), \w+\)", listed, re.MULTILINE), *passes, "norm_forward", "norm_backward"}


def positional(text: str) -> list[str]:
    """Beginnings of the braces that fill such a struct by position."""
    text = re.sub(r"//.*", "", text)
    names, functions = "|".join(structs()), "|".join(kernels())
    by_position = r"\{\s*(?=[^}\s.])"
    patterns = [
        rf"(?<!struct )\b(?:{names})(?:<\w+>)?(?: \w+)?\s*{by_position}",
        rf"\b(?:{functions})(?:<\w+>)?\(\s*{by_position}",
        rf"\b(?:{'|'.join(MEMBERS)}) = {by_position}",
        r"[(,]\s*\{nullptr,",  # a Segments or a Launch as an argument
    ]
    found = [match[0] for pattern in patterns for match in re.finditer(pattern, text)]
    for function in re.finditer(
        rf"^ *(?:{names}) \w+\([^;{{}}]*\) (?:const )?\{{(.*?)^ *\}}$", text, re.MULTILINE | re.DOTALL
    ):
        found += re.findall(rf"return {by_position}", function[1])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_structs_of_parameters_are_filled_by_name(path):
    assert positional(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("ConvForward p{dtype, g, x};", True),
        ("k.grn_forward({dtype, segments}, t);", True),
        ("return ConvGeometry{1, side, side};", True),
        ("p.segments = {nullptr, 1, 1, rows};", True),
        ("column_splits<T>({nullptr, 1, 1, rows}, channels);", True),
        ("Segments f(int i) {\n  return {nullptr, 1, 1, i};\n}\n", True),
        ("ConvForward p{};  p.segments = {.count = 1};", False),
        ("k.grn_forward({.dtype = dtype}, t);", False),
        ("void f(const ConvForward& p) { g(p); }", False),
    ],
)
def test_what_is_caught(text, caught):
    assert bool(positional(text)) == caught


def test_every_source_is_listed_and_every_listed_source_exists():
    lines = (CSRC / "sources.txt").read_text().splitlines()
    listed = [line.split()[1] for line in lines if line and not line.startswith("#")]
    assert len(listed) == len(set(listed))
    compiled = {path.relative_to(CSRC).as_posix() for path in SOURCES if path.suffix in (".cpp", ".cu")}
    assert {name for name in compiled if name.split("/")[0] not in ("tests", "bench")} == set(listed)


def test_a_family_has_its_stem_in_every_folder():
    for family in ("conv", "norm", "mlp", "patches"):
        assert (CSRC / "cuda" / family).is_dir() and (CSRC / "torch" / f"{family}.cpp").exists()
        assert any((CSRC / "cpu" / f"{family}{suffix}").exists() for suffix in (".inl", ".cpp"))


def test_everything_reads_the_same_architectures():
    listed = [gpu["name"] for gpu in json.loads((CSRC / "architectures.json").read_text())["cuda"]]
    assert list(kernel_resources.ARCHITECTURES) == listed
    for result in ("cuda_resources.json", "triton_resources.json"):
        committed = json.loads((ROOT / "bench" / "results" / result).read_text())
        assert [name for name in committed.get("architectures") or committed["targets"] if name in listed] == listed
