"""Fine-tuning through the command line: it learns, resumes, starts from other weights, and says what is wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.reference_models import timm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convnextv2_kernels.cli import main
from convnextv2_kernels.data.labelled import EvalDataset
from convnextv2_kernels.models import create_fcmae, create_model
from convnextv2_kernels.train.checkpoint import export_encoder
from convnextv2_kernels.train.evaluate import evaluate

# Everything that draws is on; two mixed parts a step, so that both seeds and parts matter.
DRAWING = [
    "--recipe",
    "convnextv2_nano",
    "--model",
    "convnextv2_atto",
    "--epochs",
    "4",
    "--batch-size",
    "8",
    "--lr",
    "2e-3",
    "--drop-path",
    "0.3",
    "--ema-decay",
    "0.8",
    "--layer-decay",
    "0.95",
    "--mixup",
    "0.5",
    "--cutmix",
    "0.5",
    "--head-init-scale",
    "1",
    "--accumulate",
    "2",
]


def stripes(vertical: bool, index: int) -> Image.Image:
    """A picture of stripes; the two directions are the classes."""
    period, phase = 5 + index % 4, index
    wave = 127.5 + 127.5 * np.sin((np.arange(48) + phase) * 2 * np.pi / period)
    pixels = np.broadcast_to(wave, (48, 48)) if vertical else np.broadcast_to(wave[:, None], (48, 48))
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripes")
    for name, vertical in (("across", False), ("upright", True)):
        for part, count in (("train", 12), ("val", 5)):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                stripes(vertical, index + 100 * (part == "val")).save(folder / part / name / f"{index}.png")
    (folder / "train" / "upright" / "broken.png").write_text("no picture")
    return folder


def command(folder, output, *more):
    return [
        "finetune",
        "--data",
        str(folder),
        "--output",
        str(output),
        "--img-size",
        "32",
        "--workers",
        "0",
        "--device",
        "cpu",
        *more,
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(command(folder, output, *DRAWING)) == 0
    torch.set_num_threads(threads)
    return output


def test_run_leaves_everything_behind(finished, capsys):
    names = {path.name for path in finished.iterdir()}
    assert {"best.safetensors", "model.safetensors", "model_ema.safetensors", "config.json", "log.jsonl"} <= names
    assert json.loads((finished / "classes.json").read_text()) == ["across", "upright"]
    assert "upright/broken.png" in (finished / "skipped_files.txt").read_text()
    metrics = lines(finished / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [0, 1, 2, 3] and all(m["images"] == m["ema_images"] == 10 for m in metrics)
    settings = json.loads((finished / "config.json").read_text())
    assert settings["recipe"]["origins"]["smoothing"] == "paper Table 9"
    assert settings["recipe"]["origins"]["mixup"] == "given" and settings["config"]["micro_batch"] == 4
    model = create_model("convnextv2_atto", num_classes=2)
    for name in ("best", "model", "model_ema"):
        model.load_state_dict(load_file(finished / f"{name}.safetensors"))


def test_best_weights_give_the_best_result_again(folder, finished, tmp_path):
    best = max(max(m["top1"], m["ema_top1"]) for m in lines(finished / "metrics.jsonl"))
    init = str(finished / "best.safetensors")
    assert main(command(folder, tmp_path, "--init", init, "--eval-only")) == 0
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["top1"] == best and again["images"] == 10


def test_it_learns(folder, tmp_path):
    plain = "--recipe default --epochs 12 --batch-size 8 --lr 2e-3 --aa none --reprob 0 --hflip 0 --eval-every 12"
    more = ["--head-init-scale", "1", "--ema-decay", "0.8"]
    assert main(command(folder, tmp_path, *plain.split(), *more)) == 0
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics["top1"] >= 90 and metrics["ema_top1"] >= 90, metrics


def test_resume_in_mid_epoch_is_bitwise(folder, finished, tmp_path):
    assert main(command(folder, tmp_path, *DRAWING, "--max-steps", "5")) == 0
    assert len(lines(tmp_path / "log.jsonl")) == 5
    torch.rand(3)
    np.random.rand(3)
    assert main(command(folder, tmp_path, *DRAWING)) == 0
    for name in ("log.jsonl", "metrics.jsonl"):
        assert without_time(lines(tmp_path / name)) == without_time(lines(finished / name))
    for name in ("best", "model_ema"):
        ours, theirs = (load_file(f / f"{name}.safetensors") for f in (tmp_path, finished))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("source", ["encoder", "timm", "checkpoint"])
def test_starts_from_other_weights(folder, tmp_path, source, capsys):
    torch.manual_seed(3)
    path = tmp_path / "weights.safetensors"
    if source == "timm":
        network = timm.create_model("convnextv2_atto", num_classes=5)
        save_file(network.state_dict(), path)
        expected = network.state_dict()["stages.2.blocks.0.conv_dw.weight"]
    else:
        network = create_fcmae("convnextv2_atto")
        expected = network.state_dict()["encoder.stages.2.0.dwconv.weight"]
        if source == "encoder":
            export_encoder(path, network, "convnextv2_atto")
        else:
            averaged = {name: tensor + 1 for name, tensor in network.state_dict().items()}
            path = tmp_path / "checkpoint.pt"
            torch.save({"model": network.state_dict(), "model_ema": averaged, "config": {"grn": "default"}}, path)
            expected = expected + 1
    more = ["--ema"] if source == "checkpoint" else []
    # a rate of nothing: the weights of the first checkpoint are the first weights
    rate = ["--recipe", "default", "--epochs", "1", "--batch-size", "24", "--lr", "1e-30", "--min-lr", "0"]
    output = tmp_path / "run"
    assert main(command(folder, output, "--init", str(path), *more, *rate, "--max-steps", "1")) == 0
    assert torch.equal(load_file(output / "model.safetensors")["stages.2.0.dwconv.weight"], expected)


def test_held_out_share_of_a_plain_folder(folder, tmp_path):
    more = ["--val-share", "0.25", "--recipe", "default", "--epochs", "1", "--batch-size", "9"]
    assert main(command(folder / "train", tmp_path, *more)) == 0
    assert lines(tmp_path / "metrics.jsonl")[0]["images"] == 6
    assert json.loads((tmp_path / "config.json").read_text())["config"]["num_images"] == 18


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "6", "--accumulate", "2"], "leaves 3 images to be mixed in pairs"),
        (["--batch-size", "64"], "lower --batch-size to at most 24"),
        (["--init", "nothing.pt"], "there is no such file"),
        (["--grn", "l3"], "l3"),
        (["--aa", "banana"], "aa must be"),
        (["--grn", "l1", "--backend", "cpu"], "--grn l1 runs in plain PyTorch only, and --backend is cpu"),
        (["--layer-decay", "1.5"], "--layer-decay must be greater than 0 and at most 1, got 1.5"),
        (["--model", "resnet50"], "--model must be one of convnextv2_atto, "),
        (["--img-size", "16"], "--img-size 16x16 must have sides of at least 32 pixels"),
        (["--drop-path", "1"], "--drop-path must lie in [0, 1), got 1.0"),
        (["--crop-pct", "1.5"], "--crop-pct must be greater than 0 and at most 1, got 1.5"),
    ],
)
def test_bad_settings_end_with_one_sentence(folder, tmp_path, capsys, more, message):
    assert main(command(folder, tmp_path, *DRAWING, *more)) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_weights_of_another_grn_are_refused(folder, tmp_path, capsys):
    export_encoder(tmp_path / "e.safetensors", create_fcmae("convnextv2_atto", grn="none"), "convnextv2_atto")
    assert main(command(folder, tmp_path / "run", "--init", str(tmp_path / "e.safetensors"), *DRAWING)) == 1
    assert "was trained with --grn none, and --grn is default" in capsys.readouterr().err


def evaluated(capsys, folder, output, *more):
    """Exit code, standard output and error of an evaluation alone."""
    code = main(command(folder, output, "--recipe", "default", "--eval-only", *map(str, more)))
    text = capsys.readouterr()
    assert text.err.count("error") == (code != 0)
    return code, text.out, text.err.splitlines()[-1] if code else ""


@pytest.mark.parametrize("kind", ["encoder", "checkpoint"])
def test_weights_without_a_head_are_not_evaluated(folder, tmp_path, capsys, kind):
    network, path = create_fcmae("convnextv2_atto"), tmp_path / "weights.safetensors"
    if kind == "encoder":
        export_encoder(path, network, "convnextv2_atto")
    else:
        torch.save({"model": network.state_dict()}, path)
    code, out, error = evaluated(capsys, folder, tmp_path / "run", "--init", path)
    assert code == 1 and f"--init {path} has no head" in error and "top-1" not in out


def test_weights_tell_their_classes_and_sizes(folder, finished, tmp_path, capsys):
    for name in ("best", "model", "model_ema"):
        with safe_open(finished / f"{name}.safetensors", "pt") as file:
            about = file.metadata()
        assert json.loads(about["classes"]) == ["across", "upright"] and about["num_classes"] == "2"
        assert json.loads(about["img_size"]) == [32, 32] and (about["model"], about["grn"]) == (
            "convnextv2_atto",
            "default",
        )
        assert json.loads(about["mean"]) == [0.485, 0.456, 0.406] and about["in_chans"] == "3"
    for init in ("best.safetensors", "checkpoint-12.pt"):
        code, out, _ = evaluated(capsys, folder, tmp_path / "run", "--init", finished / init, "--img-size", "64")
        assert code == 0 and "was trained at 32x32 pixels, and is evaluated at 64x64" in out and "top-1" in out
        assert len(json.loads((tmp_path / "run" / "evaluation.json").read_text())["notes"]) == 1
    code, out, _ = evaluated(capsys, folder / "train", tmp_path / "share", "--init", finished / "best.safetensors")
    assert code == 0 and "note: evaluated on the share that --val-share" in out  # no folder of its own to evaluate on


@pytest.mark.parametrize(
    ("classes", "init", "message"),
    [
        (("across", "down"), "best.safetensors", "'upright' only there, and 'down' only here"),
        (("across", "down"), "checkpoint-12.pt", "'upright' only there, and 'down' only here"),
        (("across", "down", "upright"), "best.safetensors", "has a head of 2 classes, and "),
    ],
)
def test_an_evaluation_on_other_classes_is_refused(finished, tmp_path, capsys, classes, init, message):
    for name in classes:
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(2):
            stripes(False, index).save(tmp_path / "data" / name / f"{index}.png")
    code, out, error = evaluated(capsys, tmp_path / "data", tmp_path / "run", "--init", finished / init)
    assert code == 1 and message in error and "top-1" not in out


def test_weights_of_elsewhere_are_evaluated_with_a_note(folder, tmp_path, capsys):
    save_file(timm.create_model("convnextv2_atto", num_classes=2).state_dict(), tmp_path / "weights.safetensors")
    code, out, _ = evaluated(capsys, folder, tmp_path / "run", "--init", tmp_path / "weights.safetensors")
    assert code == 0 and "does not name its classes: they are taken to be the 2 subfolders of" in out


def test_a_checkpoint_of_an_older_version_is_resumed_and_evaluated(folder, tmp_path, capsys):
    """It has no description of its weights, and its pre-training no first weights."""
    short = "--recipe default --epochs 1 --batch-size 8".split()
    assert main(command(folder, tmp_path, *short, "--max-steps", "2")) == 0
    state = torch.load(tmp_path / "checkpoint-2.pt")
    del state["task"]["about"]
    torch.save(state, tmp_path / "checkpoint-2.pt")
    assert main(command(folder, tmp_path, *short)) == 0
    assert len(lines(tmp_path / "log.jsonl")) == 3
    capsys.readouterr()
    code, out, _ = evaluated(
        capsys, folder, tmp_path / "run", "--init", tmp_path / "checkpoint-2.pt", "--img-size", "64"
    )
    assert code == 0 and "does not name its classes" in out and "was trained at 32x32 pixels" in out


def test_weights_of_another_size_are_named(folder, tmp_path, capsys):
    export_encoder(tmp_path / "e.safetensors", create_fcmae("convnextv2_femto"), "convnextv2_femto")
    assert main(command(folder, tmp_path / "run", "--init", str(tmp_path / "e.safetensors"), *DRAWING)) == 1
    assert "e.safetensors: this is convnextv2_femto, --model is convnextv2_atto; give" in capsys.readouterr().err


def test_folder_of_one_class_and_changed_settings(folder, finished, tmp_path, capsys):
    shutil.copytree(folder / "train" / "across", tmp_path / "data" / "across")
    assert main(command(tmp_path / "data", tmp_path / "run", *DRAWING)) == 1
    assert "found one class, 'across'" in capsys.readouterr().err
    before = (finished / "config.json").read_text()
    assert main(command(folder, finished, *DRAWING, "--smoothing", "0")) == 1
    assert "smoothing: 0.2 in the checkpoint, 0.0 now" in capsys.readouterr().err
    assert (finished / "config.json").read_text() == before
    with pytest.raises(SystemExit) as usage:
        main(command(folder, tmp_path / "run", "--eval-only"))
    assert usage.value.code == 2
    assert "--init, which is missing" in capsys.readouterr().err


def test_evaluation_names_what_it_leaves_out(tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    pictures = [stripes(True, 1), tmp_path / "broken.png", stripes(False, 2)]

    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.tensor([[0.0, 1.0, 2.0]]).expand(len(images), 3)

    notes = []
    transform = lambda image: torch.zeros(3, 8, 8)  # noqa: E731
    dataset = EvalDataset(pictures, [2, 2, 0], transform)
    result = evaluate(Sure(), dataset, batch_size=2, note=notes.append)
    assert result["images"] == 2 and result["top1"] == 50.0 and result["top5"] == 100.0
    assert len(notes) == 1 and "broken.png" in notes[0]
