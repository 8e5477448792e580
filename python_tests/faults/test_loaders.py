"""Loaders of images that hang, are stopped, die or find no shared memory: the run says so, saves, leaves nothing."""

import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.pictures import class_folder, nested_folder
from helpers.processes import Forked, children, is_alive, wait_until
from helpers.training import losses, run_tiny
from torch import nn

from convnextv2_kernels.analysis.features import labelled_loader
from convnextv2_kernels.data import images
from convnextv2_kernels.data.augment import eval_transform
from convnextv2_kernels.data.labelled import EvalDataset
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.train import loading
from convnextv2_kernels.train.checkpoint import list_checkpoints
from convnextv2_kernels.train.evaluate import evaluate
from convnextv2_kernels.train.loading import Loading, require_shared_memory
from convnextv2_kernels.train.trainer import Spread

linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")  # noqa: PTH112
FAULTY = "6.png"  # read for the first time in the third step


def hang():
    """As a read from a network file system that is gone."""
    while True:
        time.sleep(60)


def end_by(signum):
    return lambda: os.kill(os.getpid(), signum)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return sorted(nested_folder(tmp_path_factory.mktemp("photos")).rglob("*.png"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sources):
    """The run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_tiny(output, sources, epochs=2)
    torch.set_num_threads(threads)
    return losses(output)


@pytest.fixture
def fault(monkeypatch):
    """Make reading of one file do something else, in every process that is forked from now on."""

    def set_fault(action):
        load = images.load_crop

        def faulty(source, *args, **options):
            if source.name == FAULTY:
                action()
            return load(source, *args, **options)

        monkeypatch.setattr(images, "load_crop", faulty)
        return monkeypatch

    return set_fault


def run(output, sources, workers, timeout=0.7):
    return run_tiny(output, sources, epochs=2, split=Spread(workers=workers, loader_timeout=timeout))


WHICH = r"loader \d of 2 \(process \d+\)"
FAULTS = {
    "hangs": (hang, rf"no image was read for 0\.7 s \(--loader-timeout\): {WHICH} waits for .*6\.png, whose file"),
    "is stopped": (end_by(signal.SIGSTOP), rf"{WHICH} is stopped while it read .*6\.png, by SIGSTOP or a debugger"),
    "is killed": (end_by(signal.SIGKILL), rf"{WHICH} was ended by SIGKILL \(is the .* memory\? .* read .*6\.png"),
    "has no memory": (end_by(signal.SIGBUS), r"was ended by SIGBUS \(shared memory is full, .* MB are .*--shm-size"),
    "exits": (lambda: os._exit(3), rf"{WHICH} ended with exit code 3 while it read .*6\.png"),
}
DEEPER = [pytest.param(kind, marks=pytest.mark.thorough) for kind in ("has no memory", "exits")]


@linux
@pytest.mark.parametrize("kind", ["hangs", "is stopped", "is killed", *DEEPER])
def test_a_loader_that_fails_ends_the_run_with_its_steps_saved(kind, tmp_path, sources, whole, fault):
    action, message = FAULTS[kind]
    patched = fault(action)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, sources, workers=2)
    done = len(losses(tmp_path))
    assert str(caught.value).startswith(f"step {done + 1}: ")
    assert f"checkpoint-{done}.pt" in str(caught.value) if done else "No checkpoint" in str(caught.value)
    assert [step for step, _ in list_checkpoints(tmp_path)][:1] == [done] * bool(done)
    assert not multiprocessing.active_children()
    patched.undo()
    run(tmp_path, sources, workers=0)
    assert losses(tmp_path) == whole


def test_a_read_that_hangs_in_the_process_itself_is_named(tmp_path, sources, fault):
    fault(hang)
    with pytest.raises(UserError, match=r"the thread that loads images waits for .*6\.png, whose file system may hang"):
        run(tmp_path, sources, workers=0)
    assert list_checkpoints(tmp_path)[0][0] == len(losses(tmp_path)) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_signals_are_obeyed_while_a_loader_is_waited_for(workers, tmp_path, sources, whole, fault):
    told = []

    def tell():
        # long after the other steps are done, and as long before the run would give up
        wait_until(lambda: list_tail(tmp_path), what="a step")
        time.sleep(0.3)
        told.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    patched = fault(hang)
    thread = threading.Thread(target=tell)
    thread.start()
    outcome = run(tmp_path, sources, workers, timeout=60)
    assert time.monotonic() - told[0] < 5
    thread.join()
    assert outcome.stop_signal == signal.SIGTERM and outcome.step == list_checkpoints(tmp_path)[0][0] < 8
    assert not multiprocessing.active_children()
    patched.undo()
    run(tmp_path, sources, workers=0)
    assert losses(tmp_path) == whole


def list_tail(output):
    log = output / "log.jsonl"
    return log.exists() and log.read_text().count("\n") >= 1


@linux
def test_loaders_end_with_a_run_that_is_killed(tmp_path, sources, fault):
    """One hangs, one is stopped."""
    fault(lambda: end_by(signal.SIGSTOP)() if images.torch.utils.data.get_worker_info().id else hang())
    (tmp_path / "out").mkdir()
    child = Forked(tmp_path / "log", run, tmp_path / "out", sources, 2, 60)
    workers = wait_until(lambda: len(found := children(child.pid)) >= 2 and found, what="two loaders")
    wait_until(lambda: list_tail(tmp_path / "out"), what="a step")
    os.kill(workers[0], signal.SIGSTOP)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    wait_until(lambda: not any(map(is_alive, workers)), 10, "the end of the loaders")


def test_a_pause_of_the_whole_program_is_not_counted(sources, monkeypatch):
    """As after Ctrl-Z: the clock jumps by an hour."""
    clock = SimpleNamespace(now=0.0)

    def monotonic():
        clock.now += 3600 if clock.now < 10 * 3600 else 0.01
        return clock.now

    class Slow(EvalDataset):
        def __getitem__(self, index):
            time.sleep(0.7)
            return super().__getitem__(index)

    monkeypatch.setattr(
        loading, "time", SimpleNamespace(monotonic=monotonic, monotonic_ns=time.monotonic_ns, sleep=time.sleep)
    )
    dataset = Slow(sources[:1], [0], eval_transform((32, 32)))
    assert len(list(labelled_loader(dataset, loading=Loading(timeout=60)))) == 1


def test_shared_memory_that_is_full_is_said(tmp_path, sources, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(UserError, match=r"step 1: shared memory is full .*fewer --workers.*No checkpoint had been"):
        run(tmp_path, sources, workers=1)
    assert not multiprocessing.active_children()


def test_shared_memory_is_counted_before_the_run(monkeypatch):
    """The default recipe at 4 loaders in a container's 64 MB."""
    batch = 64 * 224 * 224 * 3
    monkeypatch.setattr(loading.os, "statvfs", lambda path: SimpleNamespace(f_bavail=64 << 8, f_frsize=4096))
    monkeypatch.setattr(loading, "SHARED_MEMORY", loading.Path("/"))
    message = r"^--workers 4: .* need 87 MB of shared memory, and 67\.1 MB are free in /; .*--shm-size.*--workers 2\.$"
    with pytest.raises(UserError, match=message):
        require_shared_memory(4, batch)
    require_shared_memory(2, batch)
    require_shared_memory(0, batch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"need 96 MB of shared memory for 2 processes.*--workers 1\.$"):
        require_shared_memory(2, batch)


class _Sure(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.weight + images.mean((1, 2, 3))[:, None].expand(-1, 2)


@linux
@pytest.mark.parametrize(
    ("workers", "message"), [(1, "was ended by SIGKILL"), (0, "thread that loads images waits for")]
)
def test_evaluations_and_analyses_end_alike(workers, message, tmp_path, monkeypatch):
    class Faulty(EvalDataset):
        def _open(self, index, failures):
            if index == 3:
                self.sources[index]
                os.kill(os.getpid(), signal.SIGKILL) if workers else hang()
            return super()._open(index, failures)

    folder = class_folder(tmp_path, classes=2, each=3)
    dataset = Faulty(sorted(folder.rglob("*.png")), [0, 0, 0, 1, 1, 1], eval_transform((32, 32)))
    with pytest.raises(UserError, match=rf"^evaluation: .*{message}.*class1/0\.png"):
        evaluate(_Sure(), dataset, 2, loading=Loading(workers, 0.7))
    with pytest.raises(UserError, match=rf"{message}.*class1/0\.png"):
        list(labelled_loader(dataset, 2, Loading(workers, 0.7)))
    assert not multiprocessing.active_children()
