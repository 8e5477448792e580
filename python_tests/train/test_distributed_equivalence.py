"""Two processes over gloo give the run of one: DDP and FSDP2, clipped, in parts, resumed on another number of them."""

import json
from pathlib import Path

import pytest
import torch
from helpers.pictures import picture
from helpers.training import lines, tiny_model
from safetensors.torch import load_file

from convnextv2_kernels.cli import main
from convnextv2_kernels.train.distributed import processes

from .two_processes import STEPS, join, needs_gloo, run, spawn, values

FINETUNE = (
    "finetune --recipe convnextv2_nano --model convnextv2_atto --img-size 32 --epochs 2 --batch-size 8 --lr 1e-3 "
    "--warmup-epochs 0 --drop-path 0.3 --ema-decay 0.5 --head-init-scale 1 --workers 0 --device cpu --precision float64"
).split()
BATCH_WIDE = {"grn_scope": "batch", "micro_batch": 2, "precision": "float32"}
pytestmark = needs_gloo


def batch_wide():
    return tiny_model(grn_scope="batch")


def _work(rank: int, ports: list[int], folder: str) -> None:
    root = Path(folder)
    sources = sorted((root / "images").glob("*.png"))
    join(rank, ports[0])
    with processes("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (rank, 2, rank == 0)
        run(root / "ddp", sources, world)
        run(root / "fsdp", sources, world, "fsdp")
        run(root / "float32", sources, world, precision="float32")
        run(root / "accumulated", sources, world, accumulate=2)
        # 2 processes, and again as shards; the one process in between is the parent's
        run(root / "changing", sources, world, max_steps=2)
        run(root / "clipped_ddp", sources, world, clip_grad=5e-3)
        run(root / "clipped_fsdp", sources, world, "fsdp", clip_grad=5e-3)
        run(root / "clipped_parts", sources, world, "fsdp", accumulate=2, clip_grad=5e-3)
        run(root / "handed_over", sources, world, "fsdp", max_steps=3, clip_grad=5e-3)
        run(root / "batch_wide", sources, world, model=batch_wide(), **BATCH_WIDE)
    for port, words in zip(ports[1:], _commands(root), strict=True):
        join(rank, port)
        assert main(words) == 0, words


def _commands(root: Path) -> list[list[str]]:
    """Run by both processes, one after the other."""
    data = ["--data", str(root / "classes")]
    plain = ["--mixup", "0", "--cutmix", "0", "--parallel", "fsdp"]
    best = str(root / "shards" / "best.safetensors")
    return [
        [*FINETUNE, *data, *plain, "--output", str(root / "shards")],
        [*FINETUNE, *data, "--max-steps", "3", "--output", str(root / "mixed")],
        [*FINETUNE, *data, "--init", best, "--eval-only", "--output", str(root / "evaluated")],
    ]


def _shards(rank: int, ports: list[int], folder: str) -> None:
    root = Path(folder)
    join(rank, ports[0])
    with processes("cpu") as world:
        outcome = run(root / "changing", sorted((root / "images").glob("*.png")), world, "fsdp")
        assert outcome.resumed_from.name == "checkpoint-4.pt" and outcome.step == STEPS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All runs: those of two processes, and those of one that they are compared with."""
    root = tmp_path_factory.mktemp("equivalence")
    outputs = "ddp fsdp float32 accumulated changing clipped_ddp clipped_fsdp clipped_parts handed_over batch_wide"
    for name in ("images", *outputs.split(), "one", "one32", "clipped_one", "batch_wide_one"):
        (root / name).mkdir()
    for index in range(8):
        picture(index).save(root / "images" / f"{index}.png")
    for part, count in (("train", 8), ("val", 3)):
        for label in range(2):
            (root / "classes" / part / str(label)).mkdir(parents=True)
            for index in range(count - (part == "val" and label)):
                picture(20 * label + index, (40, 36)).save(root / "classes" / part / str(label) / f"{index}.png")
    spawn(_work, str(root), ports=4)
    sources = sorted((root / "images").glob("*.png"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(root / "one", sources)
    run(root / "one32", sources, precision="float32", accumulate=2)
    run(root / "changing", sources, max_steps=4)
    run(root / "clipped_one", sources, clip_grad=5e-3)
    outcome = run(root / "handed_over", sources, clip_grad=5e-3)
    assert outcome.resumed_from.name == "checkpoint-3.pt"
    run(root / "batch_wide_one", sources, accumulate=2, model=batch_wide(), **BATCH_WIDE)
    torch.set_num_threads(threads)
    spawn(_shards, str(root))
    return root


@pytest.mark.parametrize("name", ["ddp", "fsdp", "accumulated", "changing"])
def test_float64_run_is_that_of_one_process(root, name):
    """Only the order of sums differs: a few hundred float64 roundings a step, carried through six AdamW steps."""
    ours, theirs = (values(root / kind, "loss", "grad_norm") for kind in (name, "one"))
    assert ours.shape == (STEPS, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    a, b = (torch.load(root / kind / f"checkpoint-{STEPS}.pt") for kind in (name, "one"))
    for key in ("model", "model_ema"):
        assert list(a[key]) == list(b[key])
        for parameter, tensor in a[key].items():
            # AdamW divides by a root of squares: where both are roundings, the quotient is not
            torch.testing.assert_close(tensor, b[key][parameter], rtol=1e-6, atol=1e-8, msg=f"{key} {parameter}")


def test_float32_is_bitwise_that_of_one_process_with_the_same_parts(root):
    """Two halves are added either way, and a sum of two does not depend on their order."""
    names = ("loss", "lr")
    assert torch.equal(values(root / "float32", *names), values(root / "one32", *names))
    a, b = (torch.load(root / name / f"checkpoint-{STEPS}.pt") for name in ("float32", "one32"))
    assert all(torch.equal(tensor, b["model"][name]) for name, tensor in a["model"].items())


@pytest.mark.parametrize("name", ["clipped_ddp", "clipped_fsdp", "clipped_parts", "handed_over"])
def test_clipped_run_is_that_of_one_process(root, name):
    """Only the order of sums differs, some hundred float64 roundings a step; the bound on the norm is active."""
    ours, theirs = (values(path, "loss", "grad_norm") for path in (root / name, root / "clipped_one"))
    assert (theirs[:, 1] > 5e-3).all() and ours.shape == (STEPS, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    a, b = (torch.load(path / f"checkpoint-{STEPS}.pt") for path in (root / name, root / "clipped_one"))
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


def test_batch_wide_grn_is_that_of_the_parts(root):
    """The images of a process share one norm, as those of a part do; a sum of two does not depend on its order."""
    ours, theirs = (values(root / name, "loss") for name in ("batch_wide", "batch_wide_one"))
    assert torch.equal(ours, theirs)
    a, b = (torch.load(root / name / f"checkpoint-{STEPS}.pt")["model"] for name in ("batch_wide", "batch_wide_one"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


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


def test_mixed_run_is_resumed_by_one_process_with_as_many_parts(root, tmp_path, capsys):
    words = [*FINETUNE, "--data", str(root / "classes"), "--accumulate", "2", "--output"]
    assert main([*words, str(tmp_path)]) == 0
    assert main([*words, str(root / "mixed")]) == 0
    assert "processes was 2 and is 1 now" in capsys.readouterr().out
    ours, theirs = (lines(path / "log.jsonl") for path in (root / "mixed", tmp_path))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-9)
    assert main([*words[:-3], "--output", str(root / "mixed")]) == 1  # other images would be mixed
    assert "micro_batch: 4 in the checkpoint, 8 now" in capsys.readouterr().err
