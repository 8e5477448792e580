"""Signals in every phase of a command: what is done is kept, and the command says one word."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.pictures import class_folder, nested_folder
from helpers.training import lines, make_networks_tiny, run_tiny, tiny_model
from safetensors import safe_open

from convnextv2_kernels import _interrupts
from convnextv2_kernels._interrupts import Terminated, raised_signals
from convnextv2_kernels.cli import main
from convnextv2_kernels.data import folder as data_folder
from convnextv2_kernels.models import FCMAE
from convnextv2_kernels.train import evaluate, pretrain
from convnextv2_kernels.train.checkpoint import list_checkpoints
from convnextv2_kernels.train.signals import StopRequest

ROOT = Path(__file__).parents[2]
FINETUNE = (
    "finetune --recipe default --img-size 32 --epochs 2 --batch-size 4 --workers 0 --device cpu --lr 1e-3 "
    "--ema-decay 0.5 --aa none"
).split()
PRETRAIN = "pretrain --img-size 64 --epochs 1 --batch-size 4 --workers 0 --device cpu --lr 1e-3".split()


@pytest.fixture
def photos(tmp_path):
    return nested_folder(tmp_path / "photos")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_run_that_is_told_to_stop_saves_and_ends(name, tmp_path, photos):
    signum = signal.Signals[name]

    class Told(FCMAE):
        calls = 0

        def forward(self, *args):
            self.calls += 1
            if self.calls == 2:
                signal.raise_signal(signum)
            return super().forward(*args)

    (tmp_path / "out").mkdir()
    handler = signal.getsignal(signum)
    outcome = run_tiny(tmp_path / "out", sorted(photos.rglob("*.png")), model=tiny_model(kind=Told))
    assert (outcome.stop_signal, outcome.step) == (signum, 2)
    assert list_checkpoints(tmp_path / "out")[0][0] == 2
    assert signal.getsignal(signum) is handler


def test_what_nohup_ignores_stays_ignored():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request, raised_signals():
            signal.raise_signal(signal.SIGHUP)
        assert request.signum is None
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_signals_raise_outside_of_training():
    for signum in _interrupts.STOPPING:
        with pytest.raises(KeyboardInterrupt) as caught, raised_signals():
            signal.raise_signal(signum)
        assert isinstance(caught.value, Terminated) == (signum != signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("name", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_the_verdicts_on_images_are_kept(name, code, word, tmp_path, photos, monkeypatch, capsys):
    """The signal comes when the fourth file has been looked at."""
    calls = []

    def update(progress, done, *args, **more):
        calls.append(done)
        if done == 4:
            signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr(pretrain.Progress, "update", update)
    words = [*PRETRAIN, "--data", str(photos), "--output", str(tmp_path / "out")]
    assert main(words) == code
    assert capsys.readouterr().err.splitlines() == [word]
    kept = json.loads((tmp_path / "out" / data_folder.CACHE_NAME).read_text())
    assert all(f"{number}.png" in str(kept) for number in range(4))
    monkeypatch.undo()
    assert calls[-1] == 4 and not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("phase", ["export_encoder", pytest.param("save_picture", marks=pytest.mark.thorough)])
def test_an_end_that_is_interrupted_is_done_by_the_next_call(phase, tmp_path, photos, monkeypatch, capsys):
    """After the last step, in the middle of what is written then."""
    make_networks_tiny(monkeypatch)
    words = [*PRETRAIN, "--data", str(photos), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, phase, lambda *args, **more: signal.raise_signal(signal.SIGINT))
        assert main(words) == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted"]
    assert main(words) == 0
    assert {"encoder.safetensors", "checkpoint-2.pt"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").glob(".*.tmp"))


def state_of(output):
    """What a finished fine-tuning run leaves, to the bit."""
    state = torch.load(output / "checkpoint-4.pt")
    log = [(r["step"], r["loss"], r["grad_norm"]) for r in lines(output / "log.jsonl")]
    weights = {name: weights_of(output / f"{name}.safetensors") for name in ("best", "model", "model_ema")}
    return log, lines(output / "metrics.jsonl"), state["task"], state["evaluation_pending"], weights


def weights_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return class_folder(tmp_path_factory.mktemp("classes") / "classes", classes=2, each=5)


@pytest.fixture(scope="module")
def finished(classes, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        make_networks_tiny(patch)
        assert main([*FINETUNE, "--data", str(classes), "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    return state_of(output)


@pytest.mark.parametrize("evaluation", [2, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 4))])
def test_an_evaluation_that_is_cut_short_is_done_again(evaluation, classes, finished, tmp_path, monkeypatch, capsys):
    """The epoch's checkpoint is there before it; two evaluations an epoch, of the weights and of their average."""
    done, update = [], evaluate.TopK.update

    def told(self, *args):
        done.append(self)
        if len(set(map(id, done))) == evaluation:
            signal.raise_signal(signal.SIGTERM)
        return update(self, *args)

    make_networks_tiny(monkeypatch)
    words = [*FINETUNE, "--data", str(classes), "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.TopK, "update", told)
        patch.setattr(evaluate, "_batches", one_more(evaluate._batches))
        assert main(words) == 143
    newest = list_checkpoints(tmp_path)[0]
    assert newest[0] == 2 * ((evaluation + 1) // 2)
    assert torch.load(newest[1])["evaluation_pending"] is True
    assert len(lines(tmp_path / "metrics.jsonl") if (tmp_path / "metrics.jsonl").exists() else []) == newest[0] // 2 - 1
    assert main(words) == 0
    assert state_of(tmp_path) == finished
    assert "Traceback" not in capsys.readouterr().err


def one_more(batches):
    """Look once more after the last batch whether a signal came."""

    def looked(loader, world, signum):
        yield from batches(loader, world, signum)
        if signum():
            raise evaluate.Stopped(signum())

    return looked


def test_checkpoints_from_before_the_order_was_turned_resume_alike(classes, finished, tmp_path, monkeypatch):
    """They were written after the evaluation, and do not say so."""
    make_networks_tiny(monkeypatch)
    words = [*FINETUNE, "--data", str(classes), "--output", str(tmp_path)]
    assert main([*words, "--max-steps", "2"]) == 0
    path = tmp_path / "checkpoint-2.pt"
    state = torch.load(path)
    assert state.pop("evaluation_pending") is False and state["task"]["best"]["epoch"] == 0
    torch.save(state, path)
    assert main(words) == 0
    assert state_of(tmp_path) == finished


@pytest.mark.parametrize(
    "delay", [0.15, 1.0, *(pytest.param(d / 10, marks=pytest.mark.thorough) for d in range(3, 40, 4))]
)
def test_a_command_is_interrupted_from_its_first_line_on(delay, tmp_path, photos):
    """Most of this time Python imports PyTorch."""
    words = [*PRETRAIN, "--epochs", "100", "--data", str(photos), "--output", str(tmp_path / "out")]
    child = subprocess.Popen(
        [sys.executable, "-m", "convnextv2_kernels", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors.splitlines() == ["interrupted"] or "Stopped by SIGINT" in output


def test_a_program_that_imports_the_package_keeps_its_handler(monkeypatch):
    assert not _interrupts._is_started()
    for argv, started in ((["-m"], True), (["/x/__main__.py"], False)):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "convnextv2_kernels", "info"])
        assert _interrupts._is_started() is started
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "somebodys_package"])
    assert not _interrupts._is_started()
