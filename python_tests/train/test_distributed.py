"""Several processes in combination: clipping, parts and batch-wide GRN, shards gone on with by one process, faults of a
single process, and whole commands."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from convnextv2_kernels.cli import main
from convnextv2_kernels.train import distributed
from convnextv2_kernels.train.errors import TrainingError

from .conftest import picture, tiny_model
from .test_processes import run, values
from .two_processes import FINETUNE, STEPS, batch_wide, work

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What two processes did, and one process after them or beside them."""
    root = tmp_path_factory.mktemp("distributed")
    outputs = (
        "ddp fsdp parts handed_over batch_wide batch_wide_one gone one_gone blocked board poisoned steep stopped one"
    )
    for name in ("images", *outputs.split()):
        (root / name).mkdir()
    for index in range(8):
        picture(index).save(root / "images" / f"{index}.png")
    for name in ("copy0", "copy1", "spare", "holed"):
        shutil.copytree(root / "images", root / name)
    (root / "holed" / "0.png").unlink()
    for part, count in (("train", 8), ("val", 3)):
        for label in range(2):
            (root / "classes" / part / str(label)).mkdir(parents=True)
            for index in range(count - (part == "val" and label)):
                picture(20 * label + index, (40, 36)).save(root / "classes" / part / str(label) / f"{index}.png")
    torch.multiprocessing.spawn(work, (free_ports(5), str(root)), nprocs=2)
    return root


@pytest.fixture(scope="module")
def one(root):
    """The same on one process."""
    sources = sorted((root / "images").glob("*.png"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(root / "one", sources, clip_grad=5e-3)
    outcome = run(root / "handed_over", sources, clip_grad=5e-3)
    assert outcome.resumed_from.name == "checkpoint-3.pt"
    scope = {"grn_scope": "batch", "micro_batch": 2, "precision": "float32"}
    run(root / "batch_wide_one", sources, accumulate=2, model=batch_wide(), **scope)
    torch.set_num_threads(threads)
    return root / "one"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "parts", "handed_over"])
def test_clipped_run_is_that_of_one_process(root, one, name):
    """Only the order of sums differs, some hundred float64 roundings a step; the bound on the norm is active."""
    ours, theirs = (values(path, "loss", "grad_norm") for path in (root / name, one))
    assert (theirs[:, 1] > 5e-3).all() and ours.shape == (STEPS, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    a, b = (torch.load(path / f"checkpoint-{STEPS}.pt") for path in (root / name, one))
    assert list(a["model"]) == list(tiny_model().state_dict())
    for key in ("model", "model_ema"):
        for parameter, tensor in a[key].items():
            # AdamW divides by a root of squares: where both are roundings, the quotient is not
            torch.testing.assert_close(tensor, b[key][parameter], rtol=1e-6, atol=1e-8, msg=f"{key} {parameter}")
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for parameter, moments in a["optimizer"]["state"].items():
        for kind, tensor in b["optimizer"]["state"][parameter].items():
            # the moments are sums of gradients, all clipped to 5e-3: a floor of their roundings
            torch.testing.assert_close(moments[kind], tensor, rtol=1e-9, atol=1e-14, msg=f"{kind} {parameter}")


def test_batch_wide_grn_is_that_of_the_parts(root, one):
    """The images of a process share one norm, as those of a part do; a sum of two does not depend on its order."""
    ours, theirs = (values(root / name, "loss") for name in ("batch_wide", "batch_wide_one"))
    assert torch.equal(ours, theirs)
    a, b = (torch.load(root / name / f"checkpoint-{STEPS}.pt")["model"] for name in ("batch_wide", "batch_wide_one"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_run_whose_data_came_back_is_as_never_stopped(root, one, tmp_path):
    """Three of six steps were done on two processes; nothing of the step without data was taken."""
    shutil.copytree(root / "gone", tmp_path / "gone")
    outcome = run(tmp_path / "gone", sorted((root / "spare").glob("*.png")))
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", sorted((root / "spare").glob("*.png")))
    assert outcome.resumed_from.name == "checkpoint-3.pt"
    ours, theirs = (values(tmp_path / name, "loss", "grad_norm") for name in ("gone", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)  # float64, see above


def test_faults_of_one_process_leave_the_last_good_step(root):
    assert len(lines(root / "poisoned" / "log.jsonl")) == 2
    assert not (root / "steep" / "log.jsonl").exists()
    assert [r["step"] for r in lines(root / "stopped" / "log.jsonl")] == [1, 2]
    state = torch.load(root / "stopped" / "checkpoint-2.pt")
    assert {k: v.shape for k, v in state["model"].items()} == {k: v.shape for k, v in tiny_model().state_dict().items()}


def test_fine_tuning_in_shards_is_that_of_one_process(root, tmp_path):
    words = [*FINETUNE, "--data", str(root / "classes"), "--mixup", "0", "--cutmix", "0", "--output", str(tmp_path)]
    assert main(words) == 0
    ours, theirs = (lines(path / "log.jsonl") for path in (root / "shards", tmp_path))
    # float64; three AdamW steps carry the different order of sums
    assert len(ours) == 4
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-9)
    ours, theirs = (lines(path / "metrics.jsonl") for path in (root / "shards", tmp_path))
    for a, b in zip(ours, theirs, strict=True):
        assert a["images"] == a["ema_images"] == 5
        assert {k: v for k, v in a.items() if "loss" not in k} == {k: v for k, v in b.items() if "loss" not in k}
        assert a["ema_loss"] == pytest.approx(b["ema_loss"], rel=1e-5)  # taken in float32
    for name in ("best", "model", "model_ema"):
        a, b = (load_file(path / f"{name}.safetensors") for path in (root / "shards", tmp_path))
        assert list(a) == list(b)
        for parameter, tensor in a.items():
            torch.testing.assert_close(tensor, b[parameter], rtol=1e-5, atol=1e-8)  # stored as they are trained
    best = max(max(m["top1"], m["ema_top1"]) for m in lines(root / "shards" / "metrics.jsonl"))
    again = json.loads((root / "evaluated" / "evaluation.json").read_text())
    assert again["images"] == 5 and again["top1"] == best


def test_mixed_run_goes_on_in_one_process_with_as_many_parts(root, tmp_path, capsys):
    words = [*FINETUNE, "--data", str(root / "classes"), "--accumulate", "2", "--output"]
    assert main([*words, str(tmp_path)]) == 0
    assert main([*words, str(root / "mixed")]) == 0
    assert "processes was 2 and is 1 now" in capsys.readouterr().out
    ours, theirs = (lines(path / "log.jsonl") for path in (root / "mixed", tmp_path))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-9)
    assert main([*words[:-3], "--output", str(root / "mixed")]) == 1  # other images would be mixed
    assert "micro_batch: 4 in the checkpoint, 8 now" in capsys.readouterr().err


def test_torchrun_pre_trains_in_shards(root, tmp_path):
    words = [
        "--img-size",
        "64",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--lr",
        "1e-3",
        "--workers",
        "0",
        "--precision",
        "float64",
    ]
    command = ["pretrain", "--data", str(root / "spare"), *words, "--output"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*launch, "-m", "convnextv2_kernels", *command, str(tmp_path / "two"), "--parallel", "fsdp"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(done.stdout.count(text) == 1 for text in ("settings (recipe", "2 processes (fsdp)", "picture: "))
    assert main([*command, str(tmp_path / "one")]) == 0
    ours, theirs = (lines(tmp_path / name / "log.jsonl") for name in ("two", "one"))
    assert [r["step"] for r in ours] == [1, 2]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-9)  # float64, order of sums
    a, b = (load_file(tmp_path / name / "encoder.safetensors") for name in ("two", "one"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_more_processes_than_gpus_is_said_by_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(4):
        for name, value in (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(TrainingError, match="^--device cuda: 4 processes were started on this machine, .* 2 GPU"):
            distributed.resolve_device("auto")
