"""Printing never ends a run, and names from outside never steer a terminal.

Sinks that refuse: a pipe that nobody reads or that is full, a full disk, a closed descriptor, a terminal hung up.
"""

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers.pictures import picture
from rich.table import Table

from convnextv2_kernels import _console, cli
from convnextv2_kernels._console import Output, protected_streams, visible, visible_lines
from convnextv2_kernels._progress import Progress, Screen
from convnextv2_kernels.analysis.results import write_rows
from convnextv2_kernels.cli.exit_codes import exit_code
from convnextv2_kernels.sizes import V1_NAMES, V2_NAMES
from convnextv2_kernels.train.reconstruction import Reconstruction, save_picture

pty = pytest.importorskip("pty")
NASTY = "a\x1b[31m\r\n\udcff\u202eé"


def opened(descriptor: int, encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "wb")), encoding)


def drain(descriptor: int) -> str:
    """What a pipe or terminal holds now."""
    os.set_blocking(descriptor, False)
    found = b""
    try:
        while part := os.read(descriptor, 65536):
            found += part
    except OSError:  # nothing more, or the other end of a terminal is closed
        pass
    return found.decode()


# -- what is written


@pytest.mark.parametrize(("encoding", "accent"), [("utf-8", "é"), ("ascii", "\\xe9"), ("latin-1", "é")])
def test_names_are_escaped_and_nothing_is_too_foreign(encoding, accent):
    below = io.TextIOWrapper(io.BytesIO(), encoding)
    output = Output(below)
    print(NASTY, "\tb", file=output)
    print("\x1b[1mbold é\x1b[0m", file=output.styled())
    text = below.buffer.getvalue().decode(encoding)
    assert text == f"a\\x1b[31m\\r\n\\udcff\\u202e{accent} \tb\n\x1b[1mbold {accent}\x1b[0m\n"
    assert "\n" not in visible(NASTY) and visible_lines(NASTY).count("\n") == 1


def test_streams_are_replaced_once_and_put_back(capsys):
    before = sys.stdout, sys.stderr
    with protected_streams() as outer, protected_streams() as inner:
        assert outer is inner is sys.stdout
        print("\x07")
        print("\x08", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("\\x07\n", "\\x08\n")


def test_strings_for_rich_are_plain_text(capsys):
    table = Table("name")
    table.add_row("[red]\x1b[1m[/x]")
    with Progress("features of [/x]\x1b", 2) as progress:
        progress.update(1, detail="[/y]")
        progress.note("left out: [bold]\x1b]0;title\x07[/z] :smile:")
    Screen(width=60).print(table)
    text = capsys.readouterr().out
    assert "\x1b" not in text and "left out: [bold]\\x1b]0;title\\x07[/z] :smile:\n" in text
    assert "features of [/x]\\x1b 1/2  [/y]" in text and "[red]\\x1b[1m[/x]" in text


# -- sinks that refuse


def full_pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while os.write(writer, b"x" * 4096):
            pass
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    return writer, reader


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer, None


def hung_up_terminal():
    master, slave = pty.openpty()
    os.close(master)
    return slave, None


def full_disk():
    return os.open("/dev/full", os.O_WRONLY), None


SINKS = {closed_pipe: errno.EPIPE, full_disk: errno.ENOSPC, hung_up_terminal: errno.EIO, full_pipe: errno.EAGAIN}


@pytest.mark.parametrize("sink", SINKS)
def test_what_cannot_be_written_is_dropped(sink, monkeypatch):
    monkeypatch.setattr(_console, "PATIENCE", 0.05)
    writer, reader = sink()
    output = Output(opened(writer))
    output.destination.optional = True
    begun = time.monotonic()
    for _ in range(200):  # only the first one waits
        print("step", file=output)
    assert output.destination.lost.errno == SINKS[sink] and time.monotonic() - begun < 2
    if reader is not None:
        drain(reader)
        print("after", file=output)
        assert drain(reader) == "\n[some output could not be written here]\nafter\n"
        os.close(reader)


def test_what_must_be_seen_waits_for_its_reader():
    writer, reader = full_pipe()
    output = Output(opened(writer))
    thread = threading.Thread(target=print, args=("the answer",), kwargs={"file": output})
    thread.start()
    os.read(reader, 1 << 20)
    thread.join(10)
    assert not thread.is_alive() and output.destination.lost is None
    assert drain(reader).endswith("the answer\n")
    os.close(reader)


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_no_stream_at_all(stream):
    if stream is not None:
        stream.close()
    output = Output(stream)
    print("x", file=output)
    assert output.destination.lost.errno == errno.EBADF and not output.isatty()


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(
    ("sink", "code", "said"), [(closed_pipe, 141, ""), (full_disk, 1, "standard output: No space left on device\n")]
)
def test_the_exit_code_tells_whether_the_product_was_lost(sink, code, said, optional, monkeypatch, capsys):
    def run():
        if optional:
            _console.printing_is_optional()
        print("text")
        return 0

    monkeypatch.setattr(sys, "stdout", opened(sink()[0]))
    assert exit_code(run, "info") == (0 if optional else code)
    expected = said and ("note: some output could not be written; " if optional else "error: ") + said
    assert capsys.readouterr().err == expected


# -- progress


def watched(monkeypatch, hang_up: bool) -> str:
    """What a terminal shows of a bar, with notes and prints during it."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    monkeypatch.setattr(sys, "stdout", opened(slave))
    failed = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(args.exc_value))
    with Progress("images of [/x]\x1b]0;t\x07", 3) as progress:
        refresher = progress._bar.live._refresh_thread
        shown = drain(master)
        if hang_up:
            os.close(master)
        for step in range(1, 4):
            progress.update(step, detail="\x1b[2J[/y]")
            progress.note("note \x1b[2J")
            print("print \x1b[2J")
            progress._bar.refresh()
        assert refresher.is_alive()
    refresher.join(10)
    assert not refresher.is_alive() and not failed
    if not hang_up:
        shown += drain(master)
        os.close(master)
    return shown


def test_a_bar_keeps_its_own_codes_and_escapes_those_of_names(monkeypatch):
    shown = watched(monkeypatch, hang_up=False)
    assert "\x1b[2K" in shown and "━" in shown  # its own
    assert "\x1b[2J" not in shown and "\x1b]0" not in shown
    for text in ("images of [/x]\\x1b]0;t\\x07 ", "\\x1b[2J[/y]", "note \\x1b[2J\r\n", "print \\x1b[2J\r\n"):
        assert text in shown


def test_a_bar_outlives_its_terminal(monkeypatch):
    watched(monkeypatch, hang_up=True)


# -- whole commands


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dat\x1b[31mé")
    for name in (b"0.png", "é.png".encode(), b"\xff\xfe.png", b"\x1b[31m.png"):
        picture(len(name), (64, 64)).save(folder / os.fsdecode(name))
    (folder / "bad\x1b]0;t\x07.png").write_bytes(b"?")
    return folder


def run(words, shell: str, folder, **environment: str):
    """A command under ``/bin/sh``, with ``shell`` after it; output to pipes of ours where that leaves them alone."""
    line = f'exec "$@" {shell}' if "|" not in shell else f'{{ "$@"; echo $? > code; }} {shell}'
    command = ["/bin/sh", "-c", line, "sh", sys.executable, "-m", "convnextv2_kernels", *map(str, words)]
    done = subprocess.run(command, capture_output=True, cwd=folder, env={**os.environ, **environment}, timeout=120)
    code = int((folder / "code").read_text()) if "|" in shell else done.returncode
    return code, done.stdout.decode(), done.stderr.decode()


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
DEEP = pytest.mark.thorough


@pytest.mark.parametrize(
    ("shell", "environment"),
    [
        pytest.param("| head -c 1", {}, id="closed pipe"),
        pytest.param(">/dev/full 2>&1", ASCII, id="full disk"),
        pytest.param(">&-", ASCII, id="closed", marks=DEEP),
        pytest.param(">&- 2>&-", {}, id="both closed", marks=DEEP),
        pytest.param("2>&-", ASCII, id="standard error closed", marks=DEEP),
        pytest.param("2>&1", ASCII, id="ascii", marks=DEEP),
        pytest.param(">file 2>&1", {}, id="file", marks=DEEP),
        pytest.param("2>&1 | sleep 1", {}, id="reader that leaves late", marks=DEEP),
    ],
)
def test_a_run_reaches_its_end_whatever_becomes_of_its_output(tmp_path, data, shell, environment):
    words = ["pretrain", "--data", data, "--output", "out", "--img-size", 64, "--batch-size", 2, "--epochs", 1]
    words += ["--warmup-epochs", 0, "--workers", 0, "--decoder-width", 16]
    code, out, err = run(words, shell, tmp_path, **environment)
    assert code == 0, err
    output = tmp_path / "out"
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2] and (output / "checkpoint-2.pt").is_file() and (output / "encoder.safetensors").is_file()
    said = out + err + ((tmp_path / "file").read_text() if "file" in shell else "")
    assert "\x1b" not in said and "Traceback" not in said
    if shell in ("2>&1", ">file 2>&1"):
        assert "dat\\x1b[31m" in said and "1 unreadable file skipped" in said


@pytest.mark.parametrize(
    ("words", "shell", "code", "said"),
    [
        pytest.param(["info"], "| head -1 >/dev/null", 0, "", marks=DEEP),
        (["info"], ">/dev/full", 1, "error: standard output: No space left on device\n"),
        pytest.param(["info"], ">&-", 1, "error: standard output: it is closed\n", marks=DEEP),
        pytest.param(["info"], ">/dev/full 2>&-", 1, "", marks=DEEP),
        pytest.param(["pretrain", "--help"], ">/dev/full", 1, "error: standard output: No space left", marks=DEEP),
    ],
)
def test_what_only_prints_says_when_it_cannot(tmp_path, words, shell, code, said):
    found, _, err = run(words, shell, tmp_path)
    # head may leave before or after the text was written
    assert found in ((0, 141) if "|" in shell else (code,)) and err.startswith(said) and "Traceback" not in err


@DEEP
def test_a_closed_descriptor_is_not_given_to_a_file(tmp_path):
    code = (
        "import os, sys\n"
        "from convnextv2_kernels._console import protected_streams\n"
        "with protected_streams(): handle = open('log', 'w').fileno()\n"
        "os.write(1, b'library'); os.write(2, b'library')\n"
        "sys.exit(handle < 3)"
    )
    done = subprocess.run(["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "log").read_text() == ""


# -- the command line


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "--data", ""],
        ["pretrain", "--data", "x", "--output", ""],
        ["finetune", "--data", "x", "--init", ""],
        ["finetune", "--data", "x", "--val="],
        ["analyze", "knn", "", "--data", "x"],
        ["analyze", "cosine", "--photos", "--output", ""],
        ["bench", "--output", ""],
        ["bench", "--figure6", "--output", ""],
        ["convert", "", "x.pt", "--to", "timm"],
    ],
)
def test_an_empty_path_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and "expected a path, got ''" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["pretrain", "--data", "DATA"], ["analyze", "cosine", "--photos"], ["bench"]])
def test_an_output_that_is_a_file_is_named(words, tmp_path, data, capsys):
    taken = tmp_path / "taken"
    taken.touch()
    words = [str(data) if word == "DATA" else word for word in words]
    words += ["--random", "--model", "convnextv2_atto"] if "cosine" in words else []
    assert cli.main([*words, "--output", str(taken)]) in (1, 2)
    err = capsys.readouterr().err
    assert f"--output {taken}" in err and "File exists" in err and err.count("\n") == 1


def test_help_names_every_size(capsys):
    for command in ("pretrain", "finetune"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert ", ".join(name.removeprefix("convnextv2_") for name in V2_NAMES) in text
        assert ", ".join(V1_NAMES) in text


def test_names_in_pictures_and_tables_of_numbers(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    names = ["x$\\frac.png", os.fsdecode(b"\xff.png"), "\x1b[31m$_.png"]
    for number, name in enumerate(names):
        picture(number, (64, 64)).save(folder / name)
    words = ["--random", "--model", "convnextv2_atto", "--data", folder, "--img-size", 32, "--output", tmp_path / "out"]
    for name in names:
        assert cli.main(["analyze", "activations", *map(str, words), "--image", name, "--channels", "2"]) == 0
    write_rows(tmp_path / "rows.csv", [{"image": name} for name in names])
    assert "\\udcff.png" in (tmp_path / "rows.csv").read_text()
    pixels = torch.zeros(1, 32, 32, 3)
    save_picture(tmp_path / "a.png", Reconstruction(pixels, pixels, pixels, 0.0, 0.0, 0.0), f"{names[0]} {names[1]}")
    assert (tmp_path / "a.png").is_file()
