"""What goes wrong in one process ends all of them alike, in the last good step."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.pictures import class_folder, picture
from helpers.training import CONFIG, lines, tiny_model

from convnextv2_kernels.cli import main
from convnextv2_kernels.data.images import CropDataset
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.models import FCMAE
from convnextv2_kernels.train import distributed
from convnextv2_kernels.train.distributed import processes
from convnextv2_kernels.train.pretrain import PretrainTask
from convnextv2_kernels.train.trainer import Spread, Storage, train

from .two_processes import STEPS, join, needs_gloo, run, spawn, values

FINETUNE = (
    "finetune --recipe default --img-size 32 --epochs 1 --batch-size 8 --accumulate 3 --workers 0 --device cpu"
).split()
pytestmark = needs_gloo


class _Hooked(FCMAE):
    """Does something of its own as a numbered step begins."""

    calls, at, action = 0, 0, None

    def forward(self, images, mask=None):
        self.calls += 1
        if self.calls == self.at and self.action:
            self.action()
        return super().forward(images, mask)


def hooked(at, action):
    model = tiny_model(kind=_Hooked)
    model.at, model.action = at, action
    return model


class _Poisoned(FCMAE):
    """Its images become NaN in the second process at the third step."""

    calls = 0

    def forward(self, images, mask=None):
        self.calls += 1
        if self.calls >= 3 and dist.get_rank() == 1:
            images = images * float("nan")
        return super().forward(images, mask)


class _Signalled(FCMAE):
    """The second process alone is told to stop in its second step."""

    calls = 0

    def forward(self, images, mask=None):
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(images, mask)


class _Steep(FCMAE):
    """A finite loss whose gradient is not in the second process: the square root at zero."""

    def forward(self, images, mask=None):
        loss, pred, mask = super().forward(images, mask)
        scale = float(dist.get_rank() == 1)
        return loss + (self.mask_token * 0 + (1 - scale)).mean().sqrt(), pred, mask


def _fail():
    raise UserError("no such thing", 3)


def _work(rank: int, ports: list[int], folder: str) -> None:
    root = Path(folder)
    sources = sorted((root / "images").glob("*.png"))
    join(rank, ports[0])
    with processes("cpu") as world:
        _faults(root, sources, world)
    join(rank, ports[1])
    words = [*FINETUNE, "--data", str(root / "classes"), "--output", str(root / "uneven")]
    assert main(words) == 1, words


def _faults(root, sources, world):
    rank = world.rank

    # the second process loses its data
    mine = [root / f"copy{rank}" / source.name for source in sources]
    gone = hooked(3, (lambda: shutil.rmtree(root / "copy1")) if rank == 1 else None)
    with pytest.raises(UserError, match=r"^step 4: 8 images in a row could not be read .*checkpoint-3\.pt\.$"):
        run(root / "gone", mine, world, model=gone)

    # one file of the second process
    mine = [root / "holed" / s.name for s in sources] if rank == 1 else sources
    outcome = run(root / "one_gone", mine, world)
    assert list(outcome.failures) == [str(root / "holed" / sources[0].name)] and outcome.step == STEPS

    # the first process cannot write a checkpoint, and then finds one it cannot read
    block = (lambda: (root / "blocked" / "checkpoint-2.pt" / "x").mkdir(parents=True)) if rank == 0 else None
    with pytest.raises(UserError, match="cannot write .*checkpoint-2.pt"):
        run(root / "blocked", sources, world, model=hooked(2, block))
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        run(root / "blocked", sources, world)

    # the first process alone lacks a package that only it uses
    task = PretrainTask(tiny_model(), CropDataset(sources, CONFIG.img_size, CONFIG.seed), CONFIG)
    if rank == 0:
        sys.modules["tensorboard.compat.proto.event_pb2"] = None
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard"):
        train(task, Storage(root / "board", tensorboard=True), Spread(world))

    # NaN in the shards of the second process, and a gradient that is not finite there
    with pytest.raises(UserError, match=r"step 3 .*loss is nan.*the output of encoder\.downsample_layers\.0 "):
        run(root / "poisoned", sources, world, "fsdp", model=tiny_model(kind=_Poisoned))
    steep = tiny_model(kind=_Steep)
    with pytest.raises(UserError, match=r"the gradient is not finite.*the gradient of mask_token \[1, 16, 1, 1\]"):
        run(root / "steep", sources, world, model=steep)

    # a signal to the first process, while the model lies in shards
    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 0 else None
    outcome = run(root / "stopped", sources, world, "fsdp", model=hooked(2, stop))
    assert (outcome.stop_signal, outcome.step, outcome.checkpoint.name) == (signal.SIGTERM, 2, "checkpoint-2.pt")

    # the second process alone is told to stop, and the same as copies
    outcome = run(root / "stopped_ddp", sources, world, model=tiny_model(kind=_Signalled))
    assert outcome.stop_signal == signal.SIGTERM and outcome.step == 2 and outcome.checkpoint.exists()
    with pytest.raises(UserError, match=r"step 3 .*loss is nan.*the output of encoder\.downsample_layers\.0"):
        run(root / "poisoned_ddp", sources, world, model=tiny_model(kind=_Poisoned))

    # what no process can do
    with pytest.raises(UserError, match="a batch of 3 images cannot be split evenly over 2 process"):
        run(root / "uneven", sources, world, batch_size=3)
    with pytest.raises(UserError, match="no such thing") as caught:
        world.from_main(_fail)
    assert caught.value.code == 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What two processes did."""
    root = tmp_path_factory.mktemp("faults")
    outputs = "gone one_gone blocked board poisoned poisoned_ddp steep stopped stopped_ddp uneven"
    for name in ("images", *outputs.split()):
        (root / name).mkdir()
    for index in range(8):
        picture(index).save(root / "images" / f"{index}.png")
    for name in ("copy0", "copy1", "spare", "holed"):
        shutil.copytree(root / "images", root / name)
    (root / "holed" / "0.png").unlink()
    class_folder(root / "classes", classes=2, each=6)
    spawn(_work, str(root), ports=2)
    return root


def test_run_whose_data_came_back_is_as_never_stopped(root, tmp_path):
    """Three of six steps were done on two processes; nothing of the step without data was taken."""
    shutil.copytree(root / "gone", tmp_path / "gone")
    outcome = run(tmp_path / "gone", sorted((root / "spare").glob("*.png")))
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", sorted((root / "spare").glob("*.png")))
    assert outcome.resumed_from.name == "checkpoint-3.pt"
    ours, theirs = (values(tmp_path / name, "loss", "grad_norm") for name in ("gone", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)  # float64, only the order of sums differs


def test_faults_of_one_process_leave_the_last_good_step(root):
    assert len(lines(root / "poisoned" / "log.jsonl")) == 2
    assert not (root / "steep" / "log.jsonl").exists()
    assert [r["step"] for r in lines(root / "stopped" / "log.jsonl")] == [1, 2]
    state = torch.load(root / "stopped" / "checkpoint-2.pt")
    assert {k: v.shape for k, v in state["model"].items()} == {k: v.shape for k, v in tiny_model().state_dict().items()}


def test_all_stop_where_one_is_told_to(root):
    assert len(lines(root / "stopped_ddp" / "log.jsonl")) == 2
    assert (root / "stopped_ddp" / "checkpoint-2.pt").exists()


def test_weights_are_untouched_by_a_step_that_is_not_finite(root):
    assert len(lines(root / "poisoned_ddp" / "log.jsonl")) == 2
    state = torch.load(root / "poisoned_ddp" / "checkpoint-2.pt")
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_more_processes_than_gpus_is_said_by_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(4):
        for name, value in (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match="^--device cuda: 4 processes were started on this machine, .* 2 GPU"):
            distributed.resolve_device("auto")
