"""How every command ends: exit codes, one sentence on standard error, no traceback where nobody reads on."""

import errno
import os
import pickle
import subprocess
import sys

import pytest

from convnextv2_kernels.cli import exit_codes
from convnextv2_kernels.cli.exit_codes import BROKEN_PIPE, FAILURE, INTERRUPTED, OK, USAGE, UserError, exit_code


def ending(error):
    def run():
        raise error

    return exit_code(run, "analyze knn")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such folder"), FAILURE, "error: no such folder\n"),
        (UserError("another run's file", USAGE), USAGE, "error: another run's file\n"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted\n"),
        (KeyboardInterrupt("stopped; the same command resumes"), INTERRUPTED, "stopped; the same command resumes\n"),
        (
            ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image"),
            FAILURE,
            "error: analyze knn needs Pillow: pip install Pillow\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), FAILURE, "error: analyze knn: No space left on device\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/a\x1bb"),
            FAILURE,
            "error: analyze knn: runs/a\\x1bb: Permission denied\n",
        ),
    ],
)
def test_exceptions_become_codes_and_one_sentence(capsys, error, code, text):
    assert ending(error) == code
    assert capsys.readouterr().err == text


def test_other_exceptions_are_bugs_and_keep_their_traceback():
    bugs = (
        OSError("?"),
        OSError(errno.EBADF, "Bad file descriptor"),
        ConnectionResetError(errno.ECONNRESET, "of a peer"),
    )
    for error in (ValueError("?"), ModuleNotFoundError("No module named 'x'", name="x"), *bugs):
        with pytest.raises(type(error)):
            ending(error)
    assert exit_code(lambda: OK, "info") == 0


def test_only_the_first_of_several_processes_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ending(UserError("no such folder")) == FAILURE
    assert capsys.readouterr().err == ""


def test_expected_exceptions_of_a_library_call():
    with pytest.raises(UserError, match="^bad file$"), exit_codes.user_errors(OSError, ValueError):
        raise ValueError("bad file")
    with pytest.raises(UserError, match="^a: No such file or directory$"), exit_codes.user_errors(OSError):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a")
    for error in (BrokenPipeError("pipe"), TypeError("bug")):
        with pytest.raises(type(error)), exit_codes.user_errors(OSError, ValueError):
            raise error


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(UserError("no such folder", USAGE)))
    assert (str(error), error.code) == ("no such folder", USAGE)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        "info",
        *(pytest.param(w, marks=pytest.mark.thorough) for w in ("--help", "analyze cosine --help", "bench --help")),
    ],
)
def test_a_pipe_that_nobody_reads_ends_quietly(words, unbuffered):
    command = [sys.executable, "-m", "convnextv2_kernels", *words.split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.close()  # before anything is written, as by `| head -0`
        error = process.stderr.read()
    assert (process.returncode, error) == (BROKEN_PIPE, "")


def test_a_broken_pipe_elsewhere_is_a_bug(tmp_path):
    code = (
        "import sys; from convnextv2_kernels.cli.exit_codes import exit_code\n"
        "def run(): raise BrokenPipeError('of a worker')\n"
        "sys.exit(exit_code(run, 'pretrain'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError: of a worker" in done.stderr
