"""Training under ``torchrun`` on two processes against one process, through the real command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pictures import class_folder, picture
from helpers.training import lines
from safetensors.torch import load_file

from convnextv2_kernels.cli import main

from .two_processes import needs_gloo

ROOT = Path(__file__).parents[2]
COMMON = (
    "--recipe default --img-size 32 --epochs 2 --batch-size 4 --lr 1e-3 --drop-path 0.4 --ema-decay 0.5 --workers 0 "
    "--device cpu --head-init-scale 1"
).split()
pytestmark = needs_gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes; three images to evaluate on, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("classes")
    for part, counts in (("train", (5, 5)), ("val", (2, 1))):
        for label, count in enumerate(counts):
            (folder / part / str(label)).mkdir(parents=True)
            for index in range(count):
                picture(10 * label + index).save(folder / part / str(label) / f"{index}.png")
    return folder


def torchrun(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, "-m", "convnextv2_kernels", *words], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.thorough
def test_two_processes_are_one(folder, tmp_path, capsys):
    command = ["finetune", "--data", str(folder), *COMMON, "--precision", "float64"]
    done = torchrun(*command, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("peak learning rate") == 1  # one process speaks
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    ours, theirs = (lines(tmp_path / name / "log.jsonl") for name in ("two", "one"))
    assert len(ours) == 4
    # float64; four AdamW steps carry the different order of sums
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-9)
    ours, theirs = (lines(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["images"] == a["ema_images"] == 3
        assert (a["top1"], a["ema_top1"]) == (b["top1"], b["ema_top1"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)  # the loss of an evaluation is taken in float32


@pytest.mark.thorough
def test_mixed_images_are_those_of_one_process_with_two_parts(folder, tmp_path):
    command = ["finetune", "--data", str(folder), *COMMON, "--mixup", "0.4", "--cutmix", "0.4"]
    done = torchrun(*command, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stdout + done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*command, "--accumulate", "2", "--output", str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)
    ours, theirs = (lines(tmp_path / name / "log.jsonl") for name in ("two", "one"))
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_pre_training_in_shards(tmp_path):
    eight = class_folder(tmp_path / "eight", classes=2, each=4)
    words = "--img-size 64 --device cpu --epochs 1 --batch-size 4 --lr 1e-3 --workers 0 --precision float64".split()
    command = ["pretrain", "--data", str(eight), *words, "--output"]
    done = torchrun(*command, str(tmp_path / "two"), "--parallel", "fsdp")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(done.stdout.count(text) == 1 for text in ("settings (recipe", "2 processes (fsdp)", "picture: "))
    assert main([*command, str(tmp_path / "one")]) == 0
    ours, theirs = (lines(tmp_path / name / "log.jsonl") for name in ("two", "one"))
    assert [r["step"] for r in ours] == [1, 2]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-9)  # float64, order of sums
    a, b = (load_file(tmp_path / name / "encoder.safetensors") for name in ("two", "one"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_an_error_of_the_first_process_ends_all_with_one_sentence(tmp_path):
    done = torchrun("pretrain", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out"), "--device", "cpu")
    assert done.returncode != 0
    assert done.stderr.count("error: --data") == 1 and "there is no such folder" in done.stderr
