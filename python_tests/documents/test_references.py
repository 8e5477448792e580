"""Links between documents resolve, headings included, and the files that documents name exist."""

import re

import pytest

from .commands import read_documents
from .running import ROOT

TEXTS = {document: text for document, text in read_documents(ROOT).items() if document.endswith(".md")}
TEXTS["CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text()
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A folder, with a slash at its end, or a file of the kinds that are sources or documents.
NAMED = re.compile(r"(?<![\w./<-])((?:[\w-]+/)*(?:[\w-]+/|\w[\w.-]*\.(?:py|cpp|h|inl|cu|cuh|md|sh)))(?![\w./{*-])")
FOLDERS = ("convnextv2_kernels", "csrc", "bench", "docs", "examples", "python_tests", "tools")
SOURCES = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".txt"}
ELSEWHERE = {"main_pretrain.py", "main_finetune.py", "TRAINING.md"}  # of the official code


def repository_paths() -> set[str]:
    """Files and folders, the latter with a slash at their end, relative to the root."""
    found = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return {path.relative_to(ROOT).as_posix() + "/" * path.is_dir() for path in found}


def headings(text: str) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(document: str, text: str) -> list[str]:
    """Links that lead nowhere; those to other sites are not followed."""
    broken = []
    for target in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        if not path.exists() or (anchor and anchor not in headings(path.read_text())):
            broken.append(target)
    return broken


def named_paths(text: str) -> set[str]:
    """Files and folders in backticks and in indented code, the latter only with the folder they are in."""
    inline = [match for span in re.findall(r"`([^`\n]+)`", text) for match in NAMED.findall(span)]
    code = [match for line in re.findall(r"^ {4}.*$", text, flags=re.M) for match in NAMED.findall(line)]
    return {path for path in inline if "/" in path or "." in path} | {path for path in code if "/" in path[:-1]}


def missing_paths(text: str, known: set[str]) -> list[str]:
    """Named files and folders of the repository that do not exist. ``gelu.py`` is any file of that name."""
    endings = {"/" + path for path in known}
    ours = {path for path in named_paths(text) if path not in ELSEWHERE and not path.endswith("/")}
    ours |= {path for path in named_paths(text) if path.endswith("/") and path.split("/")[0] in FOLDERS}
    return sorted(path for path in ours if not any(ending.endswith("/" + path) for ending in endings))


@pytest.mark.parametrize("document", TEXTS)
def test_links_resolve(document):
    assert not broken_links(document, TEXTS[document])


@pytest.mark.parametrize("document", TEXTS)
def test_named_files_exist(document):
    assert not missing_paths(TEXTS[document], repository_paths())


def test_documents_named_in_sources_exist():
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*") if path.suffix in SOURCES]
    named = {(name, path) for path in sources for name in re.findall(r"\bdocs/[\w/]+\.md", path.read_text())}
    assert any(name == "docs/kernels/math.md" for name, _ in named)
    assert not {f"{path.relative_to(ROOT)}: {name}" for name, path in named if not (ROOT / name).exists()}


def test_wrong_links_and_names_are_found():
    text = """# Of links
    python bench/no_such.py --out DIR/results.json
[a](README.md) [b](no.md) [c](#of-links) [d](#of-nothing) [e](docs/training.md#recipes) [f](https://example.org)
`layout.py`, `csrc/cpu/`, `csrc/gone/`, `gone.cuh`, `python -m tool a.json`, `main_pretrain.py`, `runs/`
"""
    assert broken_links("CHANGELOG.md", text) == ["no.md", "#of-links", "#of-nothing"]
    assert missing_paths(text, repository_paths()) == ["bench/no_such.py", "csrc/gone/", "gone.cuh"]
