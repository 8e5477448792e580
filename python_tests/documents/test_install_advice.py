"""Every `pip install` that the program advises names packages which PyPI has; this one is not among them."""

import ast
import re
import sys

from packaging.requirements import Requirement

from .running import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

# of the tools around the project, and what the advice puts in by itself
BESIDES = {"atheris", "pre-commit", "torch", "setuptools", "wheel", "pybind11"}
ADVICE = re.compile(r"pip install ([^,;)`\n]+)")


def packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    return {Requirement(text).name for text in named} | BESIDES


def advised(text: str) -> list[list[str]]:
    """The words of each `pip install`, which ends at a comma, a bracket, a backtick, or with its sentence."""
    return [[word.strip('"') for word in match.rstrip(". ").split()] for match in ADVICE.findall(text)]


def _texts():
    for path in sorted((ROOT / "convnextv2_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.relative_to(ROOT).as_posix(), node.value


def not_on_pypi(text: str) -> list[str]:
    return [
        word
        for words in advised(text)
        for word in words
        if not word.startswith(("-", ".", "torch==")) and re.split(r"[\[=<>]", word)[0] not in packages()
    ]


def test_advice_names_packages_that_exist():
    found = [(name, text) for name, text in _texts() if "pip install" in text]
    assert len(found) > 5
    assert not [(name, word) for name, text in found for word in not_on_pypi(text)]


def test_this_package_is_installed_from_its_clone_alone():
    assert not [(name, text) for name, text in _texts() if re.search(r"install[^.]*convnextv2_kernels\[", text)]


def test_wrong_advice_is_found():
    assert not_on_pypi('run pip install "convnextv2_kernels[train]".') == ["convnextv2_kernels[train]"]
    assert not_on_pypi("needs x: pip install PIL") == ["PIL"]
    assert not not_on_pypi("`pip install --no-build-isolation -e .` builds it there")
    assert not not_on_pypi('install it with pip install "torch==2.13.0" timm, which leaves')
