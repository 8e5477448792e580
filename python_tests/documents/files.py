"""Files that documented commands read: small pictures, and checkpoints made as their real ones are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import convnextv2_kernels as ck
from convnextv2_kernels import cli

MODEL = "convnextv2_atto"
PRETRAIN = [
    "--epochs",
    "1",
    "--batch-size",
    "4",
    "--max-steps",
    "1",
    "--img-size",
    "64",
    "--workers",
    "0",
    "--device",
    "cpu",
]


def _picture(path: Path, index: int) -> None:
    y, x = np.mgrid[:72, :80]
    waves = [np.sin((index + 1 + c) * x / 23 + c) * np.cos((index + 2) * y / 19) for c in range(3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)).save(path)


def photo(path: Path) -> None:
    """One picture."""
    _picture(path, 0)


def images(path: Path) -> None:
    """Twelve pictures, some in a subfolder."""
    for index in range(12):
        _picture(path / ("" if index < 8 else "more") / f"{index}.png", index)


def classes(path: Path) -> None:
    """Two classes of six pictures."""
    for index in range(12):
        _picture(path / ("cat", "dog")[index % 2] / f"{index}.png", index)


def official(path: Path) -> None:
    """A file of the official fine-tuning, with averaged weights beside the plain ones."""
    state = ck.convert_state_dict(ck.models.create_model(MODEL, num_classes=1000).state_dict(), to="official")
    torch.save({"model": state, "model_ema": state}, path)


def official_fcmae(path: Path) -> None:
    """A file of the official pre-training: the encoder under dense names."""
    torch.save({"model": _encoder()}, path)


def encoder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_encoder(), path)


def classifier(path: Path) -> None:
    state = ck.models.create_model(MODEL, num_classes=2).state_dict()
    save_file(ck.convert_state_dict(state, to="official"), path)


def committed(name: str) -> Callable[[Path], None]:
    """A file of bench/results."""
    return lambda path: path.write_bytes((Path(__file__).parents[2] / "bench" / "results" / name).read_bytes())


def pretraining(*more: str) -> Callable[[Path], None]:
    """A training checkpoint of a run of one step, with averaged weights."""

    def make(path: Path) -> None:
        run = path.parent / "run"
        images(path.parent / "images")
        words = ["pretrain", "--data", str(path.parent / "images"), "--output", str(run), "--ema-decay", "0.5"]
        assert cli.main([*words, *PRETRAIN, *more]) == 0
        (run / "checkpoint-1.pt").rename(path)
        shutil.rmtree(run)

    return make


def _encoder() -> dict[str, torch.Tensor]:
    state = ck.convert_state_dict(ck.models.create_fcmae(MODEL).state_dict(), to="official")
    return {name: tensor for name, tensor in state.items() if name.startswith(("stages", "downsample_layers"))}


# By the name that a document gives it.
FILES: dict[str, Callable[[Path], None]] = {
    "FOLDER": images,
    "CLASSES": classes,
    "classes": classes,
    "others": classes,
    "val": classes,
    "photo.jpg": photo,
    "SOURCE": official,
    "convnextv2_tiny_1k_224_ema.pt": official,
    "tiny_fcmae.pt": official_fcmae,
    "encoder.safetensors": encoder,
    "A.json": committed("cpu_figure6.json"),
    "B.json": committed("cpu_figure6.json"),
    "finetuned.safetensors": classifier,
    "runs/v2/checkpoint-1000.pt": pretraining(),
    "runs/v1/checkpoint-1000.pt": pretraining("--grn", "none"),
    "runs/v2/encoder.safetensors": encoder,
}
