"""One of two processes that is stopped, hangs or dies ends the other, with what can be saved and one sentence."""

import os
import signal
import time

import pytest
import torch
from helpers.pictures import nested_folder
from helpers.processes import Forked, wait_until
from helpers.training import losses, run_tiny, tiny_model
from train.two_processes import join, needs_gloo

from convnextv2_kernels.data import images
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.models import FCMAE
from convnextv2_kernels.train import peers
from convnextv2_kernels.train.checkpoint import list_checkpoints
from convnextv2_kernels.train.distributed import processes
from convnextv2_kernels.train.trainer import Spread

pytestmark = needs_gloo
TIMEOUT = 1.5


class _Hooked(FCMAE):
    """Does something of its own in the forward pass of the third step."""

    calls, action = 0, None

    def forward(self, images, mask=None):
        self.calls += 1
        if self.calls == 3 and self.action:
            self.action()
        return super().forward(images, mask)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(3600)


def fail():
    raise RuntimeError("a bug")


def hang_in_loader():
    """In the third step, of which this process reads two images."""
    load, calls = images.load_crop, []

    def faulty(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            hang()
        return load(*args, **options)

    images.load_crop = faulty


def work(rank, port, output, sources, split, timeout, action, early):
    """A training as one of two processes, in which ``action`` happens, at once or in the third step."""
    join(rank, port)
    model = tiny_model(kind=_Hooked)
    if action and early:
        action()
    elif action:
        model.action = action
    try:
        with processes("cpu", timeout) as world:
            outcome = run_tiny(output, sources, split=Spread(world, **split), model=model, batch_size=4, save_every=1)
        return 0 if outcome.stop_signal is None else 128 + outcome.stop_signal
    except UserError as error:
        print(f"error: {error}", flush=True)
        return error.code


@pytest.fixture
def start(tmp_path, monkeypatch, free_port):
    """Start two processes; the second one does something of its own."""
    for name, value in (("BEAT", 0.2), ("GRACE", 0.7)):
        monkeypatch.setattr(peers, name, value)
    sources = sorted(nested_folder(tmp_path / "photos").rglob("*.png"))[:8]
    (tmp_path / "out").mkdir()
    started = []

    def begin(action, early=False, timeout=TIMEOUT, **split):
        for rank in (0, 1):
            own = action if rank else None
            arguments = (rank, free_port, tmp_path / "out", sources, split, timeout, own, early)
            started.append(Forked(tmp_path / f"log{rank}", work, *arguments))
        return started

    yield begin
    for process in started:
        if process.running():
            process.kill()


@pytest.fixture
def whole(tmp_path, start):
    """Losses of the run that nothing disturbs, by one process with two parts."""

    def losses_of_it():
        (tmp_path / "whole").mkdir()
        sources = sorted((tmp_path / "photos").rglob("*.png"))[:8]
        run_tiny(tmp_path / "whole", sources, split=Spread(accumulate=2), batch_size=4)
        return losses(tmp_path / "whole")

    return losses_of_it


def newest(tmp_path):
    found = list_checkpoints(tmp_path / "out")
    return found[0][0] if found else None


def resumed(tmp_path):
    sources = sorted((tmp_path / "photos").rglob("*.png"))[:8]
    run_tiny(tmp_path / "out", sources, split=Spread(accumulate=2), batch_size=4)
    return losses(tmp_path / "out")


def test_a_stopped_process_is_noticed_in_the_middle_of_a_step(tmp_path, start, whole):
    """The first waits inside PyTorch for gradients, where nothing but a thread notices."""
    first, second = start(stop)
    assert first.wait() == 1
    assert "error: process 1 of 2 gives no sign of life for 1.5 s. The last checkpoint is" in first.text()
    assert newest(tmp_path) == len(losses(tmp_path / "out")) == 2
    second.kill()
    assert resumed(tmp_path) == whole()


def test_a_process_that_dies_is_said_in_one_sentence(tmp_path, start):
    first, _ = start(die)
    assert first.wait() == 1
    assert "error: another process of the run has ended or cannot be reached. The last" in first.text()
    assert "Traceback" not in first.text() and newest(tmp_path) == 2


def test_signals_are_obeyed_while_a_silent_process_is_waited_for(tmp_path, start):
    first, _ = start(stop, timeout=60)
    wait_until(lambda: newest(tmp_path) == 2, what="the second step")
    time.sleep(0.2)
    begun = time.monotonic()
    first.kill(signal.SIGTERM)
    assert first.wait() == 143 and time.monotonic() - begun < 5
    assert "error: stopped by SIGTERM, and process 1 of 2 gives no sign of life for" in first.text()


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_all_processes_stop_while_a_loader_of_one_hangs(told, tmp_path, start):
    """A signal to either ends both; neither is lost."""
    both = start(hang_in_loader, early=True, timeout=60)
    wait_until(lambda: newest(tmp_path) == 2, what="the second step")
    time.sleep(0.2)
    begun = time.monotonic()
    both[told].kill(signal.SIGTERM)
    assert [process.wait() for process in both] == [143, 143] and time.monotonic() - begun < 6
    assert newest(tmp_path) == len(losses(tmp_path / "out"))


def test_all_processes_end_where_a_loader_of_one_hangs(tmp_path, start, whole):
    both = start(hang_in_loader, early=True, timeout=60, loader_timeout=0.7)
    assert [process.wait() for process in both] == [1, 1]
    for process in both:
        assert "error: step 3: no image was read for 0.7 s (--loader-timeout): the thread that loads" in process.text()
        assert ".png, whose file system may hang. The last checkpoint is" in process.text()
    assert newest(tmp_path) == len(losses(tmp_path / "out")) == 2
    assert resumed(tmp_path) == whole()


@pytest.mark.thorough
@pytest.mark.parametrize("action", [stop, die, fail])
def test_sharded_runs_end_with_their_last_checkpoint(action, tmp_path, start):
    first, _ = start(action, parallel="fsdp")
    assert first.wait() == 1
    assert "error: " in first.text() and "checkpoint-2.pt" in first.text() and newest(tmp_path) == 2


@pytest.mark.thorough
def test_a_process_that_lives_and_does_not_answer_is_left(tmp_path, start):
    """It hangs in the middle of a step; when the first has left, it notices that in turn."""
    first, second = start(hang, timeout=0.5)
    assert first.wait() == 1
    assert "another process of the run lets this one wait for too long in an exchange" in first.text()
    assert second.wait() == 1
    assert "process 0 of 2 (or the store of torchrun) gives no sign of life" in second.text()


@pytest.mark.thorough
def test_long_work_of_the_first_process_alone_is_no_silence(tmp_path, start, monkeypatch):
    """Such as the checking of millions of images, ten times as long as a silence may be."""

    def slow_work(rank, port, *rest):
        join(rank, port)
        with processes("cpu", 0.5) as world:
            return world.from_main(lambda: time.sleep(6))

    monkeypatch.setitem(globals(), "work", slow_work)
    assert [process.wait() for process in start(None)] == [0, 0]


@pytest.mark.thorough
def test_the_first_process_may_be_the_silent_one(tmp_path, start, monkeypatch):
    original = work

    def turned(rank, port, output, sources, split, timeout, action, early):
        return original(rank, port, output, sources, split, timeout, None if action else stop, early)

    monkeypatch.setitem(globals(), "work", turned)
    _, second = start(stop)
    assert second.wait() == 1
    assert "error: process 0 of 2 (or the store of torchrun) gives no sign of life for 1.5 s." in second.text()
    assert torch.load(tmp_path / "out" / "checkpoint-2.pt")["step"] == 2
