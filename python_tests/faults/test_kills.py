"""kill -9 in every phase of a run: the same command, called again, ends with the same bits and leaves nothing else."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.pictures import class_folder, nested_folder
from helpers.processes import Forked, is_alive, wait_until
from helpers.training import lines, make_networks_tiny
from safetensors import safe_open

from convnextv2_kernels import _files
from convnextv2_kernels.cli import main
from convnextv2_kernels.train import checkpoint, evaluate, finetune, pretrain, trainer

ROOT = Path(__file__).parents[2]
SHARED = "--epochs 2 --batch-size 4 --workers 1 --device cpu --lr 1e-3 --ema-decay 0.5 --save-every 1".split()
COMMANDS = {
    "pretrain": ["pretrain", "--img-size", "64", *SHARED],
    "finetune": ["finetune", "--recipe", "default", "--img-size", "32", "--aa", "none", *SHARED],
}


def die(*args: object, **more: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, owner, name, before=True):
    """Kill the process before or after the n-th call of a function."""

    def arm():
        original, calls = getattr(owner, name), []

        def armed(*args, **more):
            calls.append(args)
            if before and len(calls) == number:
                die()
            result = original(*args, **more)
            if len(calls) == number:
                die()
            return result

        setattr(owner, name, armed)

    return arm


def in_write(number):
    """Kill the process when half of the n-th file that is written atomically is on the disk."""

    def arm():
        opened = []
        original = _files._Recorded.__init__

        def opening(recorded, file):
            opened.append(recorded)
            original(recorded, file)

        def write(recorded, data):
            half = bytes(memoryview(data))[: max(1, memoryview(data).nbytes // 2)]
            if len(opened) == number:
                recorded._file.write(half)
                recorded._file.flush()
                die()
            return recorded._file.write(data)

        _files._Recorded.__init__, _files._Recorded.write = opening, write

    return arm


PHASES = {
    "pretrain, while images are checked": at_call(5, pretrain.Progress, "update"),
    "pretrain, its settings half written": in_write(3),
    "pretrain, before the first step": at_call(1, trainer.Trainer, "_step"),
    "pretrain, between the gradients and the weights": at_call(3, trainer.StepStatus, "gather"),
    "pretrain, between the weights and the log": at_call(3, trainer.Trainer, "_write"),
    "pretrain, a checkpoint half written": in_write(6),
    "pretrain, before old checkpoints are deleted": at_call(4, trainer, "prune_checkpoints"),
    "pretrain, the encoder half written": in_write(8),
    "finetune, a checkpoint half written": in_write(5),
    "finetune, in the first evaluation": at_call(1, evaluate.TopK, "update"),
    "finetune, in the evaluation of averaged weights": at_call(2, evaluate.TopK, "update", before=False),
    "finetune, before the best weights": at_call(1, finetune, "export_weights"),
    "finetune, after the best weights": at_call(1, finetune, "export_weights", before=False),
    "finetune, in the last evaluation": at_call(4, evaluate.TopK, "update"),
    "finetune, after the last evaluation": at_call(2, finetune.FinetuneTask, "epoch_done", before=False),
    "finetune, in a step": at_call(3, trainer.Trainer, "_gradient_norm"),
}
SHORT = (
    "pretrain, a checkpoint half written",
    "finetune, in the evaluation of averaged weights",
    "finetune, after the best weights",
)


def words_of(command, data, output):
    return [*COMMANDS[command], "--data", str(data[command]), "--output", str(output)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {"pretrain": nested_folder(root / "photos"), "finetune": class_folder(root / "classes", classes=2, each=5)}


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        make_networks_tiny(patch)
        patch.setattr(pretrain, "save_picture", lambda *args: None)  # takes longer than the run
        yield


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What runs leave that nothing disturbs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left = {}
    for command in COMMANDS:
        output = tmp_path_factory.mktemp(command)
        assert main(words_of(command, data, output)) == 0
        left[command] = left_by(output)
    torch.set_num_threads(threads)
    return left


def left_by(output):
    """Losses, metrics, weights and the names of all files; no temporaries among them."""
    log = [(r["step"], r["loss"], r["grad_norm"]) for r in lines(output / "log.jsonl")]
    metrics = lines(output / "metrics.jsonl") if (output / "metrics.jsonl").exists() else None
    weights = {}
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights[path.name] = file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
    state = torch.load(output / "checkpoint-4.pt")
    return log, metrics, weights, state["task"], sorted(path.name for path in output.iterdir())


def call(words, arm):
    torch.set_num_threads(1)
    arm()
    return main(words)


@pytest.mark.parametrize(
    "phase", [phase if phase in SHORT else pytest.param(phase, marks=pytest.mark.thorough) for phase in PHASES]
)
def test_a_killed_run_ends_as_an_undisturbed_one(phase, data, whole, tmp_path):
    command = phase.partition(",")[0]
    words = words_of(command, data, tmp_path / "out")
    child = Forked(tmp_path / "log", call, words, PHASES[phase])
    assert child.wait(60) == -signal.SIGKILL, child.text()
    assert main(words) == 0
    assert left_by(tmp_path / "out") == whole[command]
    wait_until(lambda: not any(map(is_alive, session_of(child.pid))), 10, "the end of its loaders")


def session_of(leader):
    """Processes of a session, on Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader:
            found.append(int(path.parent.name))
    return found


@pytest.mark.thorough
def test_kills_at_any_time_of_the_real_command(data, tmp_path):
    """From the imports on, one after the other; then the run is done."""
    command = "finetune"
    program = (
        "import sys, pytest, torch\n"
        "torch.set_num_threads(1)\n"
        "from helpers.training import make_networks_tiny\n"
        "make_networks_tiny(pytest.MonkeyPatch())\n"
        "from convnextv2_kernels.cli import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python_tests'}"}

    def start(output):
        words = [sys.executable, "-c", program, *words_of(command, data, output)]
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait(60) == 0
    length = time.monotonic() - begun
    draw = random.Random(2)
    for _ in range(3):
        child = start(tmp_path / "killed")
        time.sleep(length * draw.uniform(0.3, 1.0))
        child.kill()
        assert "Traceback" not in child.communicate()[1]
    assert start(tmp_path / "killed").wait(60) == 0
    assert left_by(tmp_path / "killed") == left_by(tmp_path / "whole")
    assert checkpoint.list_checkpoints(tmp_path / "killed")[0][0] == 4
