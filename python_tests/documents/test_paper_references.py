"""What comments, docstrings and documents say where the paper has something: such a place exists, and is the right one.

The ConvNeXt V2 paper is meant wherever its line does not name another source (``OTHERS``).
"""

import re

import pytest

from .running import ROOT

SECTIONS = {"1", "2", "3", "4", "5", "6", "7", "A", "A.1", "A.2", "A.3", "A.4", "B", "C", "D"}
# by the section that speaks of them
TABLES = {"3": (1,), "4": (2, 3), "5": (4, 5), "6": (6, 7), "A": range(8, 14), "B": (14, 15), "D": (16,)}
FIGURES = {"3": (2, 3), "4": (3, 4, 5), "5": (1,), "C": (6, 7), "D": (8,)}
PARTS = {1: "abc", 2: "abcdef", 16: "abcd"}
EQUATIONS = {1, 2, 3}
# words that are of one section alone, where a line names a section beside them
TOPICS = {
    r"\bGRN\b|[Rr]esponse [Nn]ormali[sz]ation|[Cc]osine distance|cos\(": "4",
    r"Algorithm 1|Equations?\b": "4",
    r"\bFCMAE\b|masked autoencoder|hidden pixels": "3",
    r"MinkowskiEngine|[Ss]electivity": "C",
    r"\bCOCO\b|Mask R-CNN": "6 A.3",
    r"\bADE20K\b|UPerNet": "6 A.4",
}
OTHERS = re.compile(r"\bV1 paper|2201\.03545|Morcos|_V1\b|_AFTER_22K|_SUPERVISED")
NUMBER = r"(?:[A-D](?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?[a-z]?)(?![\w])"
PLACE = re.compile(
    rf"\b(?P<kind>[Ss]ection|[Aa]ppendix|Table|Figure|Algorithm|Equation)s? (?P<rest>{NUMBER}"
    rf"(?:(?:, | and | to |-)(?:{NUMBER}|[a-f]\b))*)"
)
LONE = re.compile(r"(?<![\w.])(A\.[0-9]+|[BCD]\.[0-9]+)(?![\w.])")
FILES = ("convnextv2_kernels", "csrc", "docs", "bench", "examples", "README.md", "CONTRIBUTING.md")
ENDINGS = {".py", ".md", ".cpp", ".h", ".inl", ".cu", ".cuh"}


def wrong_references(text: str) -> list[str]:
    """References of a text to what the paper does not have, or has elsewhere."""
    wrong = []
    for line in text.splitlines():
        if not OTHERS.search(line):
            cells = line.split(" | ") if line.startswith("|") else [line]
            wrong += [f"{fault}: {line.strip()}" for cell in cells for fault in _faults(cell)]
    return wrong


def _faults(line: str) -> list[str]:
    named = [
        ("section" if number[0] in "ABCD" else match["kind"].lower(), number)
        for match in PLACE.finditer(line)
        for number in re.findall(NUMBER, match["rest"])
        if number not in "abcdef"
    ]
    named += [("section", number) for number in LONE.findall(line)]
    sections = {number for kind, number in named if kind in ("section", "appendix")}
    things = {(kind, number) for kind, number in named if kind not in ("section", "appendix")}
    faults = [f"there is no section {number}" for number in sorted(sections - SECTIONS)]
    faults += [f"there is no {kind} {number}" for kind, number in sorted(things) if not _exists(kind, number)]
    if faults or len(sections) != 1:
        return faults
    (section,) = sections
    if len(things) == 1:
        ((kind, number),) = things
        if section[0] not in _homes(kind, number):
            return [f"{kind} {number} is not of section {section}"]
    return [
        f"{words} is of section {allowed}, not of {section}"
        for words, allowed in TOPICS.items()
        if re.search(words, line) and section not in allowed.split() and section[0] != "A" and "aper" in line
    ]


def _exists(kind: str, number: str) -> bool:
    digits = int(re.match(r"[0-9]+", number)[0]) if number[0].isdigit() else 0
    part = number[len(str(digits)) :]
    if kind == "algorithm":
        return number == "1"
    if kind == "equation":
        return digits in EQUATIONS and not part
    known = {n for numbers in (TABLES if kind == "table" else FIGURES).values() for n in numbers}
    return digits in known and (not part or (kind == "table" and part in PARTS.get(digits, "")))


def _homes(kind: str, number: str) -> set[str]:
    if kind in ("algorithm", "equation"):
        return {"4"}
    digits = int(re.match(r"[0-9]+", number)[0])
    return {section for section, numbers in (TABLES if kind == "table" else FIGURES).items() if digits in numbers}


def _texts():
    for name in FILES:
        place = ROOT / name
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.suffix in ENDINGS and "build" not in path.parts:
                yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_references_to_the_paper_are_right():
    found = {f"{name}: {fault}" for name, text in _texts() for fault in wrong_references(text)}
    assert not found, "\n".join(sorted(found))


def test_the_page_of_the_paper_has_all_of_it():
    """A row, or a heading, for every section, table with its parts, figure, equation and algorithm."""
    page = (ROOT / "docs" / "paper.md").read_text()
    named = {
        (match["kind"].lower(), number)
        for match in PLACE.finditer(page)
        for number in re.findall(NUMBER, match["rest"])
    }
    sections = {number for kind, number in named if kind in ("section", "appendix")} | set(LONE.findall(page))
    assert sections | {"A"} == SECTIONS
    tables = {number for numbers in TABLES.values() for number in numbers}
    parts = [f"{number}{part}" for number, letters in PARTS.items() for part in letters]
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for part in parts:  # Table 16a, or 2a in the rows of Table 2
        assert any(re.search(rf"\b{part}\b", row.split(" | ")[0]) for row in rows), f"no row for Table {part}"
    assert {int(re.match("[0-9]+", n)[0]) for kind, n in named if kind == "table"} == tables
    assert {int(n) for kind, n in named if kind == "figure"} == {n for numbers in FIGURES.values() for n in numbers}
    assert {1, 2, 3} <= {int(n) for kind, n in named if kind == "equation"} and ("algorithm", "1") in named


def test_they_are_found_at_all():
    count = sum(len(PLACE.findall(text)) for _, text in _texts())
    assert count > 100


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ConvNeXt V2 paper, section 3.2", "there is no section 3.2"),
        ("(paper section 3, Algorithm 1)", "algorithm 1 is not of section 3"),
        ("(ConvNeXt V2 paper, section 3, Figure 4)", "is not of section"),
        ("Figure 6 (Appendix C.1): 224 px", "there is no section C.1"),
        ("Table 17", "there is no table 17"),
        ("Tables 2d and 2g", "there is no table 2g"),
        ("Table 4b", "there is no table 4b"),
        ("Figure 9", "there is no figure 9"),
        ("Equations 1-4", "there is no equation 4"),
        ("paper, A.5", "there is no section A.5"),
        ("the paper's feature cosine distance (section 3)", "is of section 4, not of 3"),
        ("the mean of 1 - cos(X_i, X_j) (paper section 3)", "is of section 4, not of 3"),
        ("FCMAE (ConvNeXt V2 paper, section 2)", "is of section 3, not of 2"),
        ("in the paper's A.2, Table 16", "table 16 is not of section A.2"),
    ],
)
def test_wrong_ones_are_found(line, fault):
    assert any(fault in found for found in wrong_references(line))


@pytest.mark.parametrize(
    "line",
    [
        "(paper section 4, Algorithm 1)",
        "Tables 8 to 13 of A.2; Figure 3",
        "Table 2a-c and Table 16",
        "Table 1b, c: blocks and width of the decoder",
        "(Morcos et al. 2018, section 2)",
        "paper Equations 1-3",
        "Appendix C, Figure 6",
        "| 384 px: section 5 | Table 12 |",
    ],
)
def test_right_ones_are_not(line):
    assert not wrong_references(line)
