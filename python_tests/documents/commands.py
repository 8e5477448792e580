"""Finds the commands of the documents: what a reader would type into a shell.

Three forms count:

* indented code: a line after a blank line, or after another such line, that begins with a program, or with variables
  (``NAME=value python ...``, ``$A cosine ...`` where a line above says ``A="python ..."``);
* fenced code: the same in fences marked ``bash``, ``sh``, ``shell`` or ``console`` (there after the prompt);
* code in backticks, which may go on in the next line, that begins with a program and has an argument.

Comments are cut off, lines that end in a backslash are joined. Fences in other languages are not read.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = frozenset(
    [
        "cmake",
        "conda",
        "ctest",
        "curl",
        "docker",
        "git",
        "make",
        "ninja",
        "nox",
        "pip",
        "pip3",
        "pipx",
        "pytest",
        "python",
        "python3",
        "ruff",
        "torchrun",
        "tox",
        "uv",
    ]
)
SHELLS = frozenset(("bash", "sh", "shell", "console"))
ASSIGNMENT = re.compile(r"""([A-Za-z_]\w*)=("[^"]*"|'[^']*'|\S*)(?:\s+|$)""")
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
FENCE = re.compile(r"\s*(```+|~~~+)\s*(\w*)")
BACKTICKS = re.compile(r"(`+)([^`]+)\1(?!`)")
OPERATORS = frozenset("();<>|&")


@dataclass(frozen=True)
class Command:
    """A command where it stands. ``text`` is as written, in one line and without comment; ``full`` has the values of
    the document's shell variables in place."""

    document: str
    line: int
    text: str
    full: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def words(self) -> list[str]:
        """As a shell splits them; ValueError where it would do more than that."""
        lexer = shlex.shlex(self.full, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        words = list(lexer)
        for word in words:
            if word and set(word) <= OPERATORS:
                raise ValueError(
                    f"{self.place}: `{self.text}` has {word!r} outside quotes; write one command a line, and quote "
                    "what is no operator of the shell"
                )
        return words


def commands_of(document: str, text: str) -> list[Command]:
    """The commands of a Markdown text, in order."""
    found, variables = [], {}
    for line, source, inline in _code(text):
        source = " ".join(without_comment(source).split())
        assigned = ASSIGNMENT.fullmatch(source)
        if assigned and not inline:
            variables[assigned[1]] = "".join(shlex.split(assigned[2]))
        elif _is_command(source, inline):
            full = VARIABLE.sub(lambda match: variables.get(match[1], match[0]), source)
            found.append(Command(document, line, source, full))
    return found


def read_documents(root: Path) -> dict[str, str]:
    """Text of each document by its path under ``root``; of the examples their docstrings."""
    paths = [root / "README.md", *sorted((root / "docs").rglob("*.md")), root / "bench" / "README.md"]
    texts = {path: path.read_text() for path in [*paths, root / "CONTRIBUTING.md"]}
    for path in sorted((root / "examples").glob("*.py")):
        texts[path] = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    return {path.relative_to(root).as_posix(): text for path, text in texts.items()}


def without_comment(line: str) -> str:
    """The line up to a # that begins a word outside quotes."""
    quote = ""
    for i, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i].rstrip()
    return line.rstrip()


def _is_command(source: str, inline: bool) -> bool:
    rest = source
    while match := ASSIGNMENT.match(rest):
        rest = rest[match.end() :]
    program, _, arguments = rest.partition(" ")
    known = program in PROGRAMS or VARIABLE.fullmatch(program) is not None
    return known and bool(arguments or not inline)


def _code(text: str) -> Iterator[tuple[int, str, bool]]:
    """``(number of its first line, code, whether in backticks)``."""
    lines = text.splitlines()
    position, blank = 0, True
    while position < len(lines):
        start, line = position, lines[position]
        fence = FENCE.match(line)
        if fence:
            position += 1
            while position < len(lines) and not lines[position].strip().startswith(fence[1]):
                position += 1
            if fence[2] in SHELLS:
                yield from _joined(lines[start + 1 : position], start + 2, fence[2] == "console")
            position += 1
        elif not line.strip():
            position += 1
        elif blank and _indented(line):
            while position < len(lines) and (_indented(lines[position]) or not lines[position].strip()):
                position += 1
            yield from _joined(lines[start:position], start + 1, False)
            yield from _in_backticks(lines[start:position], start + 1)  # it may be the prose of a list
        else:
            while position < len(lines) and lines[position].strip() and not FENCE.match(lines[position]):
                position += 1
            yield from _in_backticks(lines[start:position], start + 1)
        blank = not lines[position - 1].strip()


def _indented(line: str) -> bool:
    return line.startswith(("    ", "\t")) and bool(line.strip())


def _in_backticks(lines: list[str], number: int) -> Iterator[tuple[int, str, bool]]:
    paragraph = "\n".join(lines)
    for match in BACKTICKS.finditer(paragraph):
        yield number + paragraph.count("\n", 0, match.start(2)), match[2], True


def _joined(lines: list[str], number: int, prompt: bool) -> Iterator[tuple[int, str, bool]]:
    """Lines of code, those that end in a backslash with their next; of a console only what follows its prompt."""
    held, first, goes_on = "", number, False
    for line in lines:
        if not goes_on:
            held, first = "", number
        if prompt and not goes_on:
            line = line.strip().removeprefix("$ ") if line.strip().startswith("$ ") else ""
        held += line.removesuffix("\\") + " "
        goes_on = line.endswith("\\")
        number += 1
        if not goes_on:
            yield first, held, False
    if goes_on:
        yield first, held, False
