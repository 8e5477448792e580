"""Every command of the documents runs, or is checked as far as a test can; ``stand_ins.py`` says how."""

import re
import shlex

import pytest

from .checks import build_requirements, collected, make_target, options, parsed_by, pip_requirements, refused
from .commands import Command, commands_of, read_documents
from .running import ROOT, Clone, Run
from .stand_ins import CHECKED, RUN, SMALLER

TEXTS = read_documents(ROOT)
DOCUMENTS = {document: commands_of(document, text) for document, text in TEXTS.items()}
# the first of each text
COMMANDS = list({c.text: c for commands in reversed(DOCUMENTS.values()) for c in reversed(commands)}.values())[::-1]

MADE_UP = """# How to
make sure that you have python 3.10. `make` alone, `python`, `make_model(2)` and `git-like` names are no commands.
Neither is `NAME=1`, nor ``--only step``; `make demo` is one (`python -m tool
run --fast`), and ``pip install ".[a]"`` too.

    python -m tool train --data "my # folder"    # the user's own
    h = gelu(a)
    A="python -m tool look"
    $A deep --label "no GRN"
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 8 -m tool \\
        train

An indented line that goes on
    make up your mind about it

```bash
cmake -S . -B build  # configure
```

```console
$ pytest -k fast
2 passed
```

```python
make = "python -m tool never"
```

* A list

    with a paragraph, and `git clone URL` in it
"""


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    """The working folder of a document, made when it is asked for."""
    made = {}

    def clone(document: str) -> Clone:
        if document not in made:
            made[document] = Clone(tmp_path_factory.mktemp("clone"), DOCUMENTS[document], RUN)
        return made[document]

    return clone


def test_commands_are_found_and_prose_is_not():
    assert [(c.line, c.text) for c in commands_of("made up", MADE_UP)] == [
        (3, "make demo"),
        (3, "python -m tool run --fast"),
        (4, 'pip install ".[a]"'),
        (6, 'python -m tool train --data "my # folder"'),
        (9, '$A deep --label "no GRN"'),
        (10, "OMP_NUM_THREADS=1 torchrun --nproc-per-node 8 -m tool train"),
        (17, "cmake -S . -B build"),
        (21, "pytest -k fast"),
        (31, "git clone URL"),
    ]
    train, deep = (commands_of("made up", MADE_UP)[i].words for i in (3, 4))
    assert train[3:] == ["train", "--data", "my # folder"]
    assert deep == ["python", "-m", "tool", "look", "deep", "--label", "no GRN"]
    with pytest.raises(ValueError, match=r"made up:1: `pip install a>=1` has '>' outside quotes"):
        _ = commands_of("made up", "`pip install a>=1`")[0].words


def test_no_command_is_overlooked():
    """Where a document has the words of one, outside of Python code, there is one that was found, or a variable."""
    for document, text in TEXTS.items():
        lines = {c.line for c in DOCUMENTS[document]}
        text = re.sub(r"```python\n.*?```", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(r"\bpython3? (-m \w|\S+\.py\b)|\b(torchrun|pytest) \S|\bpip3? install\b", line):
                assert number in lines or re.match(r"\s+\w+=", line), f"{document}:{number}: {line.strip()}"


def test_tables_hold_the_commands_of_the_documents_and_nothing_else():
    texts = {c.text for c in COMMANDS}
    stale = sorted((RUN.keys() | CHECKED.keys()) - texts)
    assert not stale, f"no document has these any more, take them out of stand_ins.py: {stale}"
    assert not RUN.keys() & CHECKED.keys()
    appended = {word for entry in RUN.values() for word in shlex.split(entry.more) if word.startswith("-")}
    assert appended == SMALLER.keys(), "what may be appended is listed, with its reason, in SMALLER; nothing else"


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (make_target, "make no-such-target"),
        (pip_requirements, 'pip install --no-build-isolation -e ".[tim]"'),
        (pip_requirements, 'pip install --no-build-isolation "torch==2.9.0" -e ".[timm]"'),
        (pip_requirements, "pip install --no-isolation --no-build-isolation -e ."),
        (pip_requirements, "pip install --no-build-isolation ."),
        (pip_requirements, "pip install -e ."),
        (build_requirements, "pip install torch wheel setuptools"),
        (options, "python -m convnextv2_kernels finetune --layerdecay 0.9"),
        (options, "python -m convnextv2_kernels finetune --layer-decay-kind pairs"),
        (options, "python -m convnextv2_kernels tun"),
        (parsed_by("parse"), "python -m bench gpu --out DIR --only stepp"),
        (collected, "pytest python_tests/conformance/test_nothing.py"),
        (refused("a CUDA graph needs"), "python examples/graphed_pretraining.py --step 100"),
    ],
)
def test_checks_refuse_what_is_wrong(check, text):
    (command,) = commands_of("made up", f"`{text}`")
    with pytest.raises((AssertionError, SystemExit)):
        check(command)


def test_a_command_fails_where_an_option_was_renamed_or_nothing_is_written(tmp_path):
    text = """
    python -m convnextv2_kernels pretrain --data FOLDER --outputs runs/a
    python -m convnextv2_kernels pretrain --data FOLDER --output runs/b --recipe papers
    python -m bench compare --help --output bench/results
    python -m bench scaling --help
    no-such-program --help
    """
    commands = commands_of("made up", text)
    clone = Clone(tmp_path, commands, {c.text: Run() for c in commands})
    assert [clone.run(c).code for c in commands] == [2, 2, 0, 0]
    assert "unrecognized arguments: --outputs" in clone.run(commands[0]).err
    assert "--recipe" in clone.run(commands[1]).err
    assert not clone.run(commands[2]).wrote and not clone.run(commands[3]).wrote


def _options(command: Command) -> tuple:
    """What a program is told, where the last of equal options counts: commands of equal options do the same."""
    words = [*command.words, *shlex.split(RUN[command.text].more)] if command.text in RUN else command.words
    options, last = {}, ""
    for word in words:
        last = word if word.startswith("--") else last
        options[last] = [] if word == last else [*options.get(last, []), word]
    return tuple(sorted((option, *values) for option, values in options.items()))


def _run():
    """The commands to run; one that does what an earlier one does, with these options, is thorough, as are those that
    their line says so of."""
    seen = set()
    for command in (c for c in COMMANDS if c.text not in CHECKED):
        deep = _options(command) in seen or (command.text in RUN and RUN[command.text].thorough)
        marks = [pytest.mark.thorough] if deep else []
        seen.add(_options(command))
        yield pytest.param(command, marks=marks, id=command.place)


@pytest.mark.parametrize("command", list(_run()))
def test_documented_command_runs(command, clones):
    assert command.text in RUN, (
        f"{command.place}: `{command.text}` is not tested; add it to RUN or CHECKED in "
        "python_tests/documents/stand_ins.py, whose first lines say how"
    )
    done = clones(command.document).run(command)
    assert done.code == 0, f"{command.place}: {done}"
    assert done.wrote, f"{command.place} wrote nothing to its output: {done}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text in CHECKED], ids=lambda c: c.place)
def test_command_that_is_not_run_is_checked(command):
    CHECKED[command.text].check(command)
