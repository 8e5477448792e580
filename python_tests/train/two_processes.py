"""What each of the two processes of test_distributed.py does."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from convnextv2_kernels.cli import main
from convnextv2_kernels.data.images import CropDataset
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.models import FCMAE
from convnextv2_kernels.train.distributed import processes
from convnextv2_kernels.train.pretrain_task import PretrainTask
from convnextv2_kernels.train.trainer import Spread, Storage, train

from .conftest import CONFIG, tiny_model
from .test_loop_features import other
from .test_processes import _Poisoned, run

STEPS = 6
FINETUNE = [
    "finetune",
    "--recipe",
    "convnextv2_nano",
    "--model",
    "convnextv2_atto",
    "--img-size",
    "32",
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--lr",
    "1e-3",
    "--warmup-epochs",
    "0",
    "--drop-path",
    "0.3",
    "--ema-decay",
    "0.5",
    "--head-init-scale",
    "1",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--precision",
    "float64",
]


class _Hooked(type(tiny_model())):
    """Does something of its own as a numbered step begins."""

    calls, at, action = 0, 0, None

    def forward(self, images, mask=None):
        self.calls += 1
        if self.calls == self.at and self.action:
            self.action()
        return super().forward(images, mask)


def hooked(at, action):
    model = other(_Hooked)
    model.at, model.action = at, action
    return model


def batch_wide():
    torch.manual_seed(7)
    return FCMAE(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), img_size=64, decoder_embed_dim=16, grn_scope="batch")


def work(rank: int, ports: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    environment = {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(environment, MASTER_PORT=str(ports[0]))
    sources = sorted((root / "images").glob("*.png"))
    with processes("cpu") as world:
        _combinations(root, sources, world)
        _faults(root, sources, world)
    for port, words in zip(ports[1:], _commands(root), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        expected = 1 if "--accumulate" in words else 0
        assert main(words) == expected, words


def _combinations(root, sources, world):
    run(root / "ddp", sources, world, clip_grad=5e-3)
    run(root / "fsdp", sources, world, "fsdp", clip_grad=5e-3)
    run(root / "parts", sources, world, "fsdp", accumulate=2, clip_grad=5e-3)
    run(root / "handed_over", sources, world, "fsdp", max_steps=3, clip_grad=5e-3)
    scope = {"grn_scope": "batch", "micro_batch": 2, "precision": "float32"}
    run(root / "batch_wide", sources, world, model=batch_wide(), **scope)


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
        sys.modules["torch.utils.tensorboard"] = None
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard"):
        train(task, Storage(root / "board", tensorboard=True), Spread(world))

    # NaN in the shards of the second process, and a gradient that is not finite there
    with pytest.raises(UserError, match=r"step 3 .*loss is nan.*the output of encoder\.downsample_layers\.0 "):
        run(root / "poisoned", sources, world, "fsdp", model=other(_Poisoned))
    steep = other(_Steep)
    with pytest.raises(UserError, match=r"the gradient is not finite.*the gradient of mask_token \[1, 16, 1, 1\]"):
        run(root / "steep", sources, world, model=steep)

    # a signal to the first process, while the model lies in shards
    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 0 else None
    outcome = run(root / "stopped", sources, world, "fsdp", model=hooked(2, stop))
    assert (outcome.stop_signal, outcome.step, outcome.checkpoint.name) == (signal.SIGTERM, 2, "checkpoint-2.pt")


class _Steep(type(tiny_model())):
    """A finite loss whose gradient is not in the second process: the square root at zero."""

    def forward(self, images, mask=None):
        loss, pred, mask = super().forward(images, mask)
        scale = float(dist.get_rank() == 1)
        return loss + (self.mask_token * 0 + (1 - scale)).mean().sqrt(), pred, mask


def _commands(root):
    """Run by both processes, one after the other."""
    data = ["--data", str(root / "classes")]
    plain = ["--mixup", "0", "--cutmix", "0", "--parallel", "fsdp"]
    return [
        [*FINETUNE, *data, *plain, "--output", str(root / "shards")],
        [*FINETUNE, *data, "--max-steps", "3", "--output", str(root / "mixed")],
        [
            *FINETUNE,
            *data,
            "--init",
            str(root / "shards" / "best.safetensors"),
            "--eval-only",
            "--output",
            str(root / "evaluated"),
        ],
        [*FINETUNE, *data, "--accumulate", "3", "--output", str(root / "uneven")],
    ]
