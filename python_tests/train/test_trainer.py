import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.pictures import picture
from helpers.training import losses, run_tiny, tiny_model

from convnextv2_kernels.errors import UserError
from convnextv2_kernels.models import FCMAE
from convnextv2_kernels.train.checkpoint import list_checkpoints
from convnextv2_kernels.train.trainer import Spread

ROOT = Path(__file__).parents[2]
# What the child processes run: slow steps, so that a signal finds them in mid-epoch.
CHILD = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from helpers.training import run_tiny
from convnextv2_kernels.data import images
from convnextv2_kernels.train.trainer import Spread
load = images.load_crop
def slow(*args):
    time.sleep(0.05)
    return load(*args)
images.load_crop = slow
outcome = run_tiny(
    Path(sys.argv[1]), sorted(Path(sys.argv[2]).rglob("*.png")), split=Spread(workers=int(sys.argv[3])), save_every=3)
sys.exit(0 if outcome.stop_signal is None else 128 + outcome.stop_signal)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sources):
    """The run that nothing interrupts: 3 epochs of 4 steps."""
    output = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_tiny(output, sources)
    torch.set_num_threads(threads)
    return output


def start_child(output, photos, workers):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python_tests'}"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(output), str(photos), str(workers)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path, child):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0]
        time.sleep(0.005)


def test_losses_fall_and_are_logged(whole):
    values = losses(whole)
    assert len(values) == 12
    assert values[0][0] == 0 and values[-1][0] == 2
    assert values[0][2] == 0 and values[2][2] == 1e-3 and values[-1][2] < 1e-4
    assert [step for step, _ in list_checkpoints(whole)] == [12, 8, 4]


def test_resume_in_mid_epoch_is_bitwise_whatever_the_workers(whole, tmp_path, sources):
    for stop, workers in ((3, 0), (6, 2), (None, 1)):
        torch.rand(stop or 1)  # A global stream in another state must not matter.
        outcome = run_tiny(tmp_path, sources, max_steps=stop, split=Spread(workers=workers))
    assert outcome.resumed_from == tmp_path / "checkpoint-6.pt"
    assert losses(tmp_path) == losses(whole)
    ours, theirs = (torch.load(f / "checkpoint-12.pt") for f in (tmp_path, whole))
    assert all(torch.equal(ours["model"][k], v) for k, v in theirs["model"].items())


def test_kill_in_mid_epoch_then_resume_is_bitwise(whole, tmp_path, photos, sources):
    child = start_child(tmp_path, photos, workers=0)
    wait_for(tmp_path / "checkpoint-6.pt", child)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert len(losses(tmp_path)) < 12
    (tmp_path / ".checkpoint-7.pt.1.tmp").write_bytes(b"what a kill in mid-write leaves")
    outcome = run_tiny(tmp_path, sources)
    assert outcome.resumed_from is not None and outcome.step == 12
    assert losses(tmp_path) == losses(whole)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_sigterm_to_the_group_saves_the_step_and_stops(whole, tmp_path, photos, sources):
    child = start_child(tmp_path, photos, workers=1)
    wait_for(tmp_path / "checkpoint-3.pt", child)
    os.killpg(child.pid, signal.SIGTERM)
    text = child.communicate(timeout=60)[0]
    assert child.returncode == 143, text
    done = len(losses(tmp_path))
    assert done < 12 and list_checkpoints(tmp_path)[0][0] == done
    assert "Traceback" not in text
    assert run_tiny(tmp_path, sources).resumed_from == tmp_path / f"checkpoint-{done}.pt"
    assert losses(tmp_path) == losses(whole)


def test_sigint_in_this_process(tmp_path, sources):
    class Interrupting(FCMAE):
        calls = 0

        def forward(self, *args):
            self.calls += 1
            if self.calls == 2:
                signal.raise_signal(signal.SIGINT)
            return super().forward(*args)

    model = tiny_model(kind=Interrupting)
    handler = signal.getsignal(signal.SIGINT)
    outcome = run_tiny(tmp_path, sources, model=model)
    assert outcome.stop_signal == signal.SIGINT and outcome.step == 2
    assert outcome.checkpoint == tmp_path / "checkpoint-2.pt"
    assert signal.getsignal(signal.SIGINT) is handler


def test_damaged_newest_checkpoint_costs_only_its_steps(whole, tmp_path, sources, capsys):
    run_tiny(tmp_path, sources, max_steps=7, save_every=1)
    newest = tmp_path / "checkpoint-7.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    outcome = run_tiny(tmp_path, sources)
    assert outcome.resumed_from == tmp_path / "checkpoint-6.pt"
    assert "warning" in (text := capsys.readouterr().out) and str(newest) in text
    assert losses(tmp_path) == losses(whole)


def test_changed_settings_are_named(tmp_path, sources):
    run_tiny(tmp_path, sources, max_steps=1)
    with pytest.raises(UserError) as error:
        run_tiny(tmp_path, sources, batch_size=3, model=None, lr=0.5)
    text = str(error.value)
    assert "batch_size: 2 in the checkpoint, 3 now" in text and "lr: 0.001" in text
    assert "seed" not in text and "checkpoint-1.pt" in text


def test_finished_run_is_left_alone(tmp_path, sources):
    run_tiny(tmp_path, sources, epochs=1)
    stamp = (tmp_path / "checkpoint-4.pt").stat().st_mtime_ns
    outcome = run_tiny(tmp_path, sources, epochs=1)
    assert outcome.losses == [] and outcome.step == outcome.total_steps == 4
    assert (tmp_path / "checkpoint-4.pt").stat().st_mtime_ns == stamp
    assert len(losses(tmp_path)) == 4


def test_loss_that_is_not_finite_stops_the_run(tmp_path, sources):
    class Exploding(FCMAE):
        calls = 0

        def forward(self, *args):
            self.calls += 1
            loss, pred, mask = super().forward(*args)
            return (loss * float("nan") if self.calls == 6 else loss), pred, mask

    model = tiny_model(kind=Exploding)
    with pytest.raises(UserError, match=r"step 6 \(epoch 2\): the loss is nan.*checkpoint-4"):
        run_tiny(tmp_path, sources, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4]


def test_file_that_breaks_in_mid_run_is_reported_once(tmp_path, sources, capsys):
    broken = tmp_path / "broken.png"
    broken.write_text("was a picture once")
    output = tmp_path / "run"
    output.mkdir()
    outcome = run_tiny(output, [broken, *sources[:3]], epochs=3)
    assert outcome.step == 6 and list(outcome.failures) == [str(broken)]
    assert capsys.readouterr().out.count("warning: ") == 1


def test_data_that_is_gone_ends_the_run_with_its_state_saved(tmp_path):
    paths = []
    for index in range(4):
        paths.append(tmp_path / f"{index}.png")
        picture(index).save(paths[-1])
    output = tmp_path / "run"
    output.mkdir()
    run_tiny(output, paths, max_steps=1)
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match="step 2: .*could not be read.*checkpoint-1"):
        run_tiny(output, paths)


def test_bfloat16_run_resumes_bitwise(tmp_path, sources):
    ends = []
    for name, stops in (("a", (None,)), ("b", (2, None))):
        output = tmp_path / name
        output.mkdir()
        for stop in stops:
            run_tiny(output, sources, max_steps=stop, epochs=1, precision="bfloat16")
        ends.append(losses(output))
    assert ends[0] == ends[1]


def test_clipping_bounds_the_step(tmp_path, sources):
    """Adam's first moments after one step are 0.1 times the gradient, so their norm is 0.1 times the bound."""
    run_tiny(tmp_path, sources, max_steps=1, clip_grad=1e-3, precision="float64")
    state = torch.load(tmp_path / "checkpoint-1.pt")["optimizer"]["state"]
    norm = torch.stack([entry["exp_avg"].norm() for entry in state.values()]).norm()
    assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # PyTorch adds 1e-6 to the norm it divides by
    assert json.loads((tmp_path / "log.jsonl").read_text())["grad_norm"] > 1e-2
