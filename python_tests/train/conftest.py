"""A tiny FCMAE, a folder of small pictures, and a run on them."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnextv2_kernels.data.folder import fingerprint
from convnextv2_kernels.data.images import CropDataset
from convnextv2_kernels.models import FCMAE
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


def tiny_model(seed: int = 7) -> FCMAE:
    torch.manual_seed(seed)
    return FCMAE(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), img_size=64, decoder_embed_dim=16)


def picture(index: int, size: tuple[int, int] = (80, 72)) -> Image.Image:
    """A smooth picture of (width, height), different for each index."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((index + 1 + c) * x / 23 + c) * np.cos((index + 2) * y / 19) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


def run_tiny(
    output: Path,
    sources: list,
    max_steps: int | None = None,
    workers: int = 0,
    save_every: int = 0,
    keep: int = 3,
    model: torch.nn.Module | None = None,
    split: Spread | None = None,
    **changes: object,
) -> Outcome:
    config = dataclasses.replace(CONFIG, num_images=len(sources), **changes)
    dataset = CropDataset(sources, config.img_size, config.seed, config.hflip)
    model = (tiny_model() if model is None else model).to(config.dtype)
    task = PretrainTask(model, dataset, config)
    return train(task, Storage(output, save_every, keep), split or Spread(workers=workers), max_steps)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of nine pictures, some in subfolders."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub" / "deeper").mkdir(parents=True)
    for index in range(9):
        place = folder if index < 5 else folder / "sub" if index < 7 else folder / "sub" / "deeper"
        picture(index).save(place / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def sources(photos) -> list[Path]:
    return sorted(photos.rglob("*.png"))
