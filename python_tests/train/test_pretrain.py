"""Whole runs through the command line, in this process."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.training import losses
from safetensors import safe_open
from safetensors.torch import load_file

from convnextv2_kernels.cli import main
from convnextv2_kernels.models import create_model
from convnextv2_kernels.train import checkpoint, recipes
from convnextv2_kernels.train.signals import folder_lock


def command(folder, output, *more):
    return [
        "pretrain",
        "--data",
        str(folder),
        "--output",
        str(output),
        "--img-size",
        "64",
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--workers",
        "0",
        *more,
    ]


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "data"
    shutil.copytree(photos, folder)
    (folder / "sub" / "broken.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run stopped by --max-steps and then finished."""
    output = tmp_path_factory.mktemp("run")
    assert main(command(folder, output, "--max-steps", "3")) == 0
    assert not (output / "encoder.safetensors").exists()
    assert main(command(folder, output)) == 0
    return output


def test_run_leaves_everything_behind(finished):
    assert len(losses(finished)) == 4
    names = {path.name for path in finished.iterdir()}
    assert {"checkpoint-2.pt", "checkpoint-3.pt", "checkpoint-4.pt"} <= names
    assert {"encoder.safetensors", "reconstruction.png", "images.json", "config.json"} <= names
    assert (finished / "skipped_files.txt").read_text().startswith("sub/broken.jpg\t")
    config = json.loads((finished / "config.json").read_text())["config"]
    assert config["lr"] == pytest.approx(1.5e-4 * 4 / 256) and config["warmup_epochs"] == 0.1
    assert config["img_size"] == [64, 64] and config["num_images"] == 9


def test_encoder_loads_into_the_dense_classifier(finished):
    tensors = load_file(finished / "encoder.safetensors")
    classifier = create_model("convnextv2_atto")
    keys = classifier.load_state_dict(tensors, strict=False)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    saved = torch.load(finished / "checkpoint-4.pt")["model"]
    assert all(torch.equal(tensors[n], saved["encoder." + n]) for n in tensors)


def test_running_again_reports_completion(folder, finished, capsys):
    assert main(command(folder, finished)) == 0
    text = capsys.readouterr().out
    assert "64x64 px, 75 % hidden (3 of 4 patches), backend" in text
    assert "complete" in text and "1 unreadable file skipped" in text
    assert str(finished / "skipped_files.txt") in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "convnextv2_femto"], "model: convnextv2_atto in the checkpoint"),
        (["--mask-ratio", "0.5"], "mask_ratio: 0.6"),
        (["--model", "resnet50"], "resnet50"),
        (["--img-size", "65"], "--img-size 65x65 must have sides that are multiples of 32 pixels"),
        (["--min-lr", "0.1"], "--min-lr 0.1 must be at most the peak learning rate"),
        (["--grn", "l2,l1"], "--grn must hold at most one of"),
        (["--img-size", "64x96"], "img_size: [64, 64]"),
    ],
)
def test_bad_settings_end_with_one_sentence(folder, finished, capsys, more, message):
    assert main(command(folder, finished, *more)) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--img-size", "32"], "the only patch of 32x32 pixels"),
        (["--img-size", "32x64"], "--mask-ratio 0.6 hides all 2 patches of 32x64 pixels"),
        (
            ["--img-size", "64", "--mask-ratio", "0.8"],
            "expected --mask-ratio of at most 0.75 at this size, or --img-size",
        ),
        (["--img-size", "96", "--mask-ratio", "0.9"], "or --img-size of at least 128 at this ratio"),
    ],
)
def test_masks_without_a_visible_patch_are_refused(folder, tmp_path, capsys, more, message):
    assert main(command(folder, tmp_path / "run", *more)) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_longer_run_starts_from_the_last_checkpoint(folder, finished, tmp_path, capsys):
    """A schedule is not stretched: another run goes on from the weights, decoder included."""
    capsys.readouterr()
    assert main(command(folder, finished, "--epochs", "3")) == 1
    error = capsys.readouterr().err
    last = finished / "checkpoint-4.pt"
    assert "was written with --epochs 2, and --epochs is now 3" in error and f"--init {last} and another" in error
    # a rate of nothing: the weights of the first checkpoint are the first weights
    more = ["--epochs", "3", "--lr", "1e-30", "--ema-decay", "0.5", "--max-steps", "1"]
    assert main(command(folder, tmp_path, *more, "--init", str(last))) == 0
    assert f"first weights: encoder and decoder of {last} (fcmae names)\n" in capsys.readouterr().out
    theirs, ours = (torch.load(path) for path in (last, tmp_path / "checkpoint-1.pt"))
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())
    assert ours["config"]["init"].startswith("sha256 ") and theirs["config"]["init"] == "random"
    # Resumed with the same weights, whatever their file is called; not without them, nor from others.
    shutil.copy(last, tmp_path / "copy.pt")
    assert main(command(folder, tmp_path, *more[:-1], "2", "--init", str(tmp_path / "copy.pt"))) == 0
    for other in ([], ["--init", str(finished / "checkpoint-3.pt")]):
        assert main(command(folder, tmp_path, *more, *other)) == 1
        assert "init: sha256 " in capsys.readouterr().err
    averaged = tmp_path / "averaged"
    assert main(command(folder, averaged, *more, "--init", str(tmp_path / "checkpoint-2.pt"), "--ema")) == 0
    ours, theirs = torch.load(averaged / "checkpoint-1.pt"), torch.load(tmp_path / "checkpoint-2.pt")
    assert all(torch.equal(tensor, theirs["model_ema"][name]) for name, tensor in ours["model"].items())


def test_a_checkpoint_that_records_no_first_weights_is_resumed(folder, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    del settings["config"]["init"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "run" / "checkpoint-4.pt").unlink()
    state = torch.load(tmp_path / "run" / "checkpoint-3.pt")
    del state["config"]["init"], state["task"]["about"]
    torch.save(state, tmp_path / "run" / "checkpoint-3.pt")
    assert main(command(folder, tmp_path / "run")) == 0
    assert losses(tmp_path / "run") == losses(finished)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--model", "convnextv2_femto"],
            "this is convnextv2_atto, --model is convnextv2_femto; give --model convnextv2_atto",
        ),
        (
            ["--decoder-width", "64"],
            "has a decoder of --decoder-depth 1 and --decoder-width 512, and they are 1 and 64",
        ),
        (["--grn", "none"], "was trained with --grn default, and --grn is none"),
        (["--ema"], "has no averaged weights, which --ema asks for"),
    ],
)
def test_first_weights_that_do_not_fit_are_told(folder, finished, tmp_path, capsys, more, message):
    assert main(command(folder, tmp_path / "run", "--init", str(finished / "checkpoint-4.pt"), *more)) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: --init ") and error.count("\n") == 1


def test_exported_encoder_tells_its_size(finished):
    with safe_open(finished / "encoder.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["img_size"]) == [64, 64] and (about["model"], about["grn"]) == (
        "convnextv2_atto",
        "default",
    )
    assert json.loads(about["std"]) == [0.229, 0.224, 0.225] and "classes" not in about


def test_options_are_named_as_they_are_written(capsys):
    for words, message in (
        (["--demo", "--decoder-width", "64"], "it does not take --decoder-width"),
        (["--demo", "--init", "a.pt", "--ema"], "it does not take --init, --ema"),
        (["--data", "x", "--ema"], "--ema takes the averaged weights of --init, which is missing"),
    ):
        with pytest.raises(SystemExit) as usage:
            main(["pretrain", *words])
        assert usage.value.code == 2 and message in capsys.readouterr().err


def test_other_folder_is_refused_by_name(photos, finished, capsys):
    assert main(command(photos, finished)) == 1
    assert "data: " in (error := capsys.readouterr().err) and f"{photos.resolve()} now" in error


def test_output_that_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(command(folder, tmp_path / "file")) == 1
    assert "--output" in capsys.readouterr().err


def test_device_that_is_not_there(folder, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(command(folder, tmp_path, "--device", "cuda")) == 1
    assert "--device cuda: cannot be used here" in capsys.readouterr().err


def test_too_few_images(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path, "--batch-size", "10")) == 1
    assert "lower --batch-size to at most 9" in capsys.readouterr().err


def test_non_square_crops(folder, tmp_path):
    size = ["--img-size", "32x96", "--epochs", "1", "--max-steps", "1"]
    assert main(command(folder, tmp_path, *size)) == 0
    assert checkpoint.newest_valid(tmp_path)[0]["config"]["img_size"] == [32, 96]


def test_one_run_at_a_time_in_a_folder(tmp_path):
    import multiprocessing

    # Record locks belong to a process: only another one can tell.
    with folder_lock(tmp_path), multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(try_lock, (tmp_path,)) == f"{tmp_path}: another run is writing to this folder."
    with folder_lock(tmp_path):
        pass


def try_lock(path):
    from convnextv2_kernels.errors import UserError

    try:
        with folder_lock(path):
            return "locked"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("words", ["--grn l1", "--grn none --decoder-depth 2 --decoder-width 32"])
def test_ablations_reach_the_model(photos, tmp_path, words):
    common = ["--data", str(photos), "--img-size", "64", "--batch-size", "4", "--epochs", "1", "--workers", "0"]
    for name, encoding in (("sparse", "sparse"), ("dense", "masked_dense")):
        more = ["--precision", "float64", "--encoding", encoding, "--lr", "1e-3", *words.split()]
        assert main(["pretrain", *common, "--output", str(tmp_path / name), *more]) == 0
    config = json.loads((tmp_path / "dense" / "config.json").read_text())["config"]
    assert config["encoding"] == "masked_dense" and config["grn"] == words.split()[1]
    state = torch.load(tmp_path / "dense" / "checkpoint-2.pt")["model"]
    assert ("decoder.1.dwconv.weight" in state) == ("--decoder-depth" in words)
    ours, theirs = ([loss for _, loss, _ in losses(tmp_path / name)] for name in ("sparse", "dense"))
    # float64 through sixteen blocks; the second step follows an AdamW step, whose quotient of roundings is coarser
    assert ours == pytest.approx(theirs, rel=1e-7) and ours[0] == pytest.approx(theirs[0], rel=1e-12)


def test_a_run_of_an_earlier_version_keeps_its_warm_up(folder, tmp_path, monkeypatch, capsys):
    """Of 800 epochs with the recipe of 1600, whose warm-up was half of that recipe's."""
    words = command(folder, tmp_path / "run", "--recipe", "paper", "--max-steps")
    words[words.index("--epochs") + 1] = "800"
    with monkeypatch.context() as earlier:
        earlier.setitem(recipes.PRETRAIN, "paper", dataclasses.replace(recipes.PRETRAIN["paper"], lengths={}))
        assert main([*words, "1"]) == 0
    assert main([*words, "2"]) == 0
    assert "this run's own, from an earlier version" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["warmup_epochs"] == 20
    assert main(command(folder, tmp_path / "new", "--recipe", "paper", "--epochs", "800", "--max-steps", "1")) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["config"]["warmup_epochs"] == 40
