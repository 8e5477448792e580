"""Tiny networks, and runs that train them."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from convnextv2_kernels.data.folder import fingerprint
from convnextv2_kernels.data.images import CropDataset
from convnextv2_kernels.models import FCMAE, ConvNeXtV2
from convnextv2_kernels.train import finetune, setup
from convnextv2_kernels.train.config import PretrainConfig
from convnextv2_kernels.train.pretrain import PretrainTask
from convnextv2_kernels.train.trainer import Outcome, Spread, Storage, train

CONFIG = PretrainConfig(
    model="tiny test model",
    img_size=(64, 64),
    patch_size=32,
    mask_ratio=0.6,
    norm_pix_loss=True,
    epochs=3,
    batch_size=2,
    lr=1e-3,
    weight_decay=0.05,
    warmup_epochs=0.5,
    seed=7,
    backend=os.environ.get("CONVNEXTV2_KERNELS_BACKEND", "auto"),
    device="cpu",
    data="test",
    num_images=9,
    images_sha256=fingerprint(["test"]),
)


def tiny_model(seed: int = 7, kind: type[FCMAE] = FCMAE, **changes: object) -> FCMAE:
    """Of class ``kind``, which may change what a forward pass does."""
    torch.manual_seed(seed)
    return kind(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), img_size=64, decoder_embed_dim=16, **changes)


def run_tiny(
    output: Path,
    sources: list,
    max_steps: int | None = None,
    split: Spread | None = None,
    save_every: int = 0,
    model: torch.nn.Module | None = None,
    **changes: object,
) -> Outcome:
    """Train on ``sources``, under :data:`CONFIG` with ``changes``."""
    config = dataclasses.replace(CONFIG, num_images=len(sources), **changes)
    dataset = CropDataset(sources, config.img_size, config.seed, config.hflip)
    model = (tiny_model() if model is None else model).to(config.dtype)
    task = PretrainTask(model, dataset, config)
    return train(task, Storage(output, save_every), split or Spread(), max_steps)


def lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(output: Path) -> list[tuple[int, float, float]]:
    """(epoch, loss, learning rate) of each step of a run, which must all be there."""
    records = lines(output / "log.jsonl")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [(r["epoch"], r["loss"], r["lr"]) for r in records]


def make_networks_tiny(patch: pytest.MonkeyPatch) -> None:
    """Let ``pretrain`` and ``finetune`` build networks of a few thousand weights, whatever their ``--model``."""
    patch.setattr(setup, "create_fcmae", lambda name, img_size, **changes: tiny_model())
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}

    def classifier(name: str, num_classes: int, **changes: object) -> ConvNeXtV2:
        return ConvNeXtV2(num_classes=num_classes, **sizes)

    patch.setattr(finetune, "create_model", classifier)


def command(name: str, data: Path, output: Path, *more: str) -> list[str]:
    """A short run of ``pretrain`` or ``finetune`` on the command line, in this process."""
    size = {"pretrain": "64", "finetune": "32"}[name]
    fixed = ["--img-size", size, "--batch-size", "4", "--workers", "0", "--epochs", "2"]
    return [name, "--data", str(data), "--output", str(output), *fixed, *more]


def config_of(output: Path) -> dict:
    """The settings of a run that decide its losses."""
    return json.loads((output / "config.json").read_text())["config"]
