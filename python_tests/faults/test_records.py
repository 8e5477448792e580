"""What a run records is never lost silently: damaged logs, full disks, output folders that go away."""

import errno
import json
import os
import shutil

import pytest
from helpers.pictures import nested_folder
from helpers.training import CONFIG, losses, run_tiny, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from convnextv2_kernels import cli
from convnextv2_kernels.data.images import CropDataset
from convnextv2_kernels.errors import UserError, describe_os_error
from convnextv2_kernels.train import loggers
from convnextv2_kernels.train.loggers import Board, StepLog
from convnextv2_kernels.train.pretrain import PretrainTask
from convnextv2_kernels.train.trainer import Storage, train

resource = pytest.importorskip("resource")
STEP = 6


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return sorted(nested_folder(tmp_path_factory.mktemp("photos")).rglob("*.png"))


def record(step: int) -> bytes:
    return b'{"step": %d, "loss": 0.25}\n' % step


def resumed(folder, content: bytes, step: int = STEP) -> tuple[bytes, bytes, list[str]]:
    """The log and what is kept beside it after a resume at ``step``, and what was said."""
    path, said = folder / "log.jsonl", []
    path.write_bytes(content)
    StepLog(path, step, said.append).close()
    beside = folder / "log.jsonl.damaged"
    return path.read_bytes(), beside.read_bytes() if beside.exists() else b"", said


GOOD = b"".join(map(record, range(1, STEP + 1)))
GARBLED = {
    "cut in the middle": b'{"step": 3, "lo\n',
    "no JSON": b"Traceback (most recent call last):\n",
    "empty": b"\n",
    "NUL bytes": b"\0" * 500 + b"\n",
    "no UTF-8": b'{"step": 3, "note": "\xff\xfe"}\n',
    "no object": b"[3]\n",
    "null": b"null\n",
    "no step": b'{"loss": 0.5}\n',
    "a text as step": b'{"step": "3"}\n',
    "a truth value as step": b'{"step": true}\n',
    "a fraction as step": b'{"step": 3.5}\n',
    "NaN as step": b'{"step": NaN}\n',
    "a negative step": b'{"step": -3}\n',
    "a huge integer": b'{"step": 1' + b"0" * 5000 + b"}\n",
    "deep nesting": b'{"step": 3, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "a later step out of its place": b'{"step": 30000}\n',
}


@pytest.mark.parametrize("what", GARBLED)
def test_a_garbled_line_costs_no_other_line(tmp_path, what):
    lines = GOOD.splitlines(keepends=True)
    log, beside, said = resumed(tmp_path, b"".join([*lines[:2], GARBLED[what], *lines[2:], record(7), b'{"step": 8']))
    assert log == GOOD and beside == GARBLED[what]
    assert len(said) == 1 and "log.jsonl: " in said[0] and "line 3; kept in log.jsonl.damaged" in said[0]
    # and again, with another one: what was kept stays
    log, beside, said = resumed(tmp_path, log + b"x\n")
    assert (log, beside, len(said)) == (GOOD, GARBLED[what] + b"x\n", 1) and "line 7;" in said[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", b""),
        (GOOD, GOOD),
        (GOOD + record(7) + record(8), GOOD),
        (GOOD + b'{"step": 7, "loss"', GOOD),
        (GOOD + b"\0" * 4096, GOOD),
        (GOOD + record(7) + b"\xff", GOOD),
        (GOOD[:-1], GOOD),
        (record(7), b""),
        (b'{"step', b""),
        (b"\xef\xbb\xbf" + GOOD, b"\xef\xbb\xbf" + GOOD),
        (GOOD.replace(b"\n", b"\r\n"), GOOD.replace(b"\n", b"\r\n")),
    ],
)
def test_only_what_is_written_again_is_dropped(tmp_path, content, expected):
    assert resumed(tmp_path, content) == (expected, b"", [])


def test_lines_out_of_order_and_twice_stay(tmp_path):
    content = record(1) + record(3) + record(2) + record(2) + record(5)
    log, beside, said = resumed(tmp_path, content)
    assert (log, beside) == (content, b"") and len(said) == 1 and "do not ascend from line 3 on" in said[0]


def test_many_damaged_lines_take_one_sentence(tmp_path):
    log, beside, said = resumed(tmp_path, b"x\n" * 1000 + GOOD)
    assert log == GOOD and beside == b"x\n" * 1000
    assert len(said) == 1 and "line 1, 2, 3, 4, 5 and 995 more;" in said[0]


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.integers(1, 12), st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")))), st.binary()
)
def test_every_record_of_a_step_done_is_kept(tmp_path_factory, lines, end):
    folder = tmp_path_factory.mktemp("log")
    content = b"".join(record(line) if isinstance(line, int) else line + b"\n" for line in lines)
    log, beside, _ = resumed(folder, content + end.replace(b"\n", b""))
    done = [line for line in lines if isinstance(line, int) and line <= STEP]
    assert [json.loads(line)["step"] for line in log.splitlines()] == done
    assert beside.splitlines(keepends=True).count(record(5)) == 0
    for line in lines:
        assert isinstance(line, int) or line + b"\n" in beside


def test_a_huge_log_is_read_within_bounds(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(record(1))
    os.truncate(path, 64 << 20)  # one line of zeros, without disk space
    with path.open("ab") as file:
        file.write(b"\n" + record(2) + record(3) * 10_000)
    said = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    StepLog(path, 2, said.append).close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    assert path.read_bytes() == record(1) + record(2) and "line 2;" in said[0]
    assert (tmp_path / "log.jsonl.damaged").stat().st_size == loggers.MAX_LINE + 1


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("name", ["log.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize(("make", "said"), [(fifo, "is a FIFO"), (device, "is a device"), (os.mkdir, "is a folder")])
def test_an_unreadable_log_is_named(tmp_path, sources, make, said, name):
    run_tiny(tmp_path, sources, max_steps=2)
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    before = (tmp_path / "checkpoint-2.pt").read_bytes()
    with pytest.raises(UserError, match=f"^{tmp_path / name} {said}, expected a regular file; move it away"):
        run_tiny(tmp_path, sources, max_steps=3)
    assert (tmp_path / "checkpoint-2.pt").read_bytes() == before and not (tmp_path / "checkpoint-3.pt").exists()


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    loop(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"log.jsonl cannot be resumed \(.*Too many levels of symbolic links\)"):
        StepLog(tmp_path / "log.jsonl", 0)


# -- while a run writes


class FullDisk:
    """RLIMIT_FSIZE, under which a file that grows beyond ``size`` bytes is refused as on a full disk."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *exception):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    with FullDisk(len(GOOD) - 5):
        for step in range(1, STEP):
            log.write({"step": step, "loss": 0.25})
        with pytest.raises(OSError, match="File too large") as failed:
            log.write({"step": STEP, "loss": 0.25})
        assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, str(path))
        assert path.read_bytes() == GOOD[: -len(record(STEP))]
    log.write({"step": STEP, "loss": 0.25})  # there is space again
    log.close()
    assert path.read_bytes() == GOOD


@pytest.mark.parametrize("what", ["log.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_saves_and_ends_in_a_sentence(tmp_path, sources, monkeypatch, what):
    def go(output):
        output.mkdir(exist_ok=True)
        task = PretrainTask(tiny_model(), CropDataset(sources, CONFIG.img_size, CONFIG.seed), CONFIG)
        return train(task, Storage(output, tensorboard=True))

    owner = StepLog if what == "log.jsonl" else Board
    right = owner.write

    def write(self, *args):
        step = args[0]["step"] if what == "log.jsonl" else args[0]
        if step == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a" / what))
        right(self, *args)

    monkeypatch.setattr(owner, "write", write)
    pattern = f"^step 3 cannot be logged: .*{what}: No space left on device. The last checkpoint is .*checkpoint-3.pt.$"
    with pytest.raises(UserError, match=pattern):
        go(tmp_path / "a")
    monkeypatch.undo()
    go(tmp_path / "a")
    go(tmp_path / "b")
    whole = losses(tmp_path / "b")
    found = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {r["step"]: r["loss"] for r in found}.items() <= dict(enumerate((x[1] for x in whole), 1)).items()
    assert len(found) == len(whole) - (what == "log.jsonl")  # the sentence said so


def test_a_full_disk_names_both_log_and_checkpoint(tmp_path, sources):
    run_tiny(tmp_path, sources, max_steps=1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "pad": "x" * 10_000}) + "\n")
    size = (tmp_path / "log.jsonl").stat().st_size
    content = (tmp_path / "log.jsonl").read_bytes()
    said = "^step 2 cannot be logged: .*log.jsonl: File too large. Nor can it be saved: cannot write .*checkpoint-2.pt"
    with FullDisk(size + 10), pytest.raises(UserError, match=f"{said}.*The last checkpoint is .*checkpoint-1.pt.$"):
        run_tiny(tmp_path, sources)
    assert (tmp_path / "log.jsonl").read_bytes() == content and not list(tmp_path.glob(".*.tmp"))


def disturbed(run_folder, sources, disturb) -> str:
    """The sentence in which a run ends whose folder is disturbed before step 3 is logged."""

    class Disturbed(PretrainTask):
        def loss(self, network, batch, first, span):
            if span.step == 2:
                disturb(run_folder)
            return super().loss(network, batch, first, span)

    task = Disturbed(tiny_model(), CropDataset(sources, CONFIG.img_size, CONFIG.seed), CONFIG)
    try:
        train(task, Storage(run_folder, save_every=1))
    except UserError as error:
        return str(error)
    except OSError as error:  # which the command line makes a sentence of
        return describe_os_error(error)
    return ""


def test_an_output_folder_that_goes_away_is_named(tmp_path, sources):
    folder = tmp_path / "run"
    folder.mkdir()
    assert disturbed(folder, sources, shutil.rmtree) == f"{folder / 'log.jsonl'}: No such file or directory"
    assert not folder.exists()
    folder.mkdir()
    away = tmp_path / "away"
    assert "No such file or directory" in disturbed(folder, sources, lambda f: f.rename(away))
    assert (away / "checkpoint-2.pt").is_file() and len(losses(away)) >= 2


def test_a_log_that_is_removed_is_begun_again_with_a_warning(tmp_path, sources, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    assert disturbed(folder, sources, lambda f: (f / "log.jsonl").unlink(missing_ok=True)) == ""
    assert "log.jsonl was removed or replaced during the run; a new one was begun" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(4, 13))


@pytest.mark.thorough
@pytest.mark.parametrize("size", [100, 2000, 1 << 20])
def test_commands_on_a_full_disk_end_in_a_sentence_that_names_a_file(tmp_path, sources, capsys, size):
    data = sources[0].parent
    output = tmp_path / "out"
    words = ["pretrain", "--data", data, "--output", output, "--img-size", 64, "--batch-size", 2, "--epochs", 1]
    words += ["--warmup-epochs", 0, "--workers", 0, "--decoder-width", 16]
    with FullDisk(size):
        assert cli.main(list(map(str, words))) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "File too large" in err and str(output) in err and err.count("\n") == 1
    assert not list(output.glob(".*.tmp"))
