"""The command line from end to end: tiny checkpoints, folders of pictures, files read back."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers.networks import autoencoder, network
from helpers.pictures import class_folder
from PIL import Image

from convnextv2_kernels import cli
from convnextv2_kernels.analysis import cosine_by_layer, selectivity_by_layer
from convnextv2_kernels.analysis.plots import COLORS
from convnextv2_kernels.data.images import load_crop, normalize


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folder(tmp_path_factory.mktemp("data") / "val")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two FCMAE training checkpoints, with and without GRN."""
    folder, paths = tmp_path_factory.mktemp("runs"), []
    for grn in ("default", "none"):
        config = {"model": "tiny", "img_size": [64, 64], "patch_size": 32, "mask_ratio": 0.5, "grn": grn}
        state = {"format": 1, "model": autoencoder(grn=grn).state_dict(), "step": 3, "config": config}
        paths.append(folder / grn / "checkpoint-3.pt")
        paths[-1].parent.mkdir()
        torch.save(state, paths[-1])
    return paths


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def has_colour(pixels, colour, least=50):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - wanted).max(-1) < 12).sum() >= least


def crops(data):
    paths = sorted(data.rglob("*.png"))
    return paths, normalize(torch.stack([load_crop(path, (64, 64), None) for path in paths]))


def run(*words):
    return cli.main(["analyze", *map(str, words)])


def test_cosine_compares_networks(tmp_path, data, checkpoints, capsys):
    output = tmp_path / "out"
    assert run("cosine", *checkpoints, "--random", "--data", data, "--output", output, "--batch-size", 5) == 0
    rows = rows_of(output / "cosine.csv")
    labels = ["default/checkpoint-3", "none/checkpoint-3", "untrained"]
    assert [row["network"] for row in rows] == [label for label in labels for _ in range(5)]
    expected = cosine_by_layer(autoencoder(grn="none"), [crops(data)[1]])
    for row, layer in zip(rows[5:10], expected, strict=True):
        assert (row["name"], row["images"]) == (layer.name, "12")
        # float32 features of other batch sizes; averages over 12 images
        assert float(row["mean"]) == pytest.approx(layer.mean, abs=1e-5)
        assert float(row["dead_share"]) == pytest.approx(layer.dead_share, abs=1e-12)
    record = json.loads((output / "cosine.json").read_text())
    assert record["settings"]["tap"] == "grn" and record["settings"]["data"]["images"] == 12
    assert [n["grn"] for n in record["networks"][:2]] == ["default", "none"]
    assert record["versions"]["torch"] == torch.__version__ and len(record["results"]) == 15
    assert str(tmp_path) not in (output / "cosine.json").read_text()
    picture = pixels_of(output / "cosine.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 800
    assert all(has_colour(picture, colour) for colour in COLORS[:3])
    assert "none/checkpoint-3: mean distance over 5 layers" in capsys.readouterr().out
    assert sorted(p.name for p in output.iterdir()) == ["cosine.csv", "cosine.json", "cosine.png"]


def test_cosine_of_some_images_of_different_classes(tmp_path, data, checkpoints):
    words = ["--label", "one", "--data", data, "--output", tmp_path, "--images", 3, "--tap", "act"]
    assert run("cosine", checkpoints[0], *words, "--img-size", "32x64") == 0
    record = json.loads((tmp_path / "cosine.json").read_text())
    assert record["settings"]["data"]["images"] == 3 and record["settings"]["img_size"] == [32, 64]
    assert {row["images"] for row in record["results"]} == {3}


def test_selectivity_with_chance_level(tmp_path, data, checkpoints):
    (tmp_path / "lost.txt").write_text("no image")
    words = ["--label", "with", "--label", "without", "--data", data, "--output", tmp_path, "--shuffled"]
    assert run("selectivity", *checkpoints, *words) == 0
    rows = rows_of(tmp_path / "selectivity.csv")
    paths, images = crops(data)
    labels = torch.tensor([int(path.parent.name[-1]) for path in paths])
    for label, grn in (("with", "default"), ("without", "none")):
        expected = selectivity_by_layer(autoencoder(grn=grn), [(images, labels)], 3)
        found = [float(row["selectivity"]) for row in rows if row["network"] == label]
        # float32 features of other batch sizes, magnified where the denominator is small
        np.testing.assert_allclose(found, torch.cat([e.index_of_unit for e in expected]), rtol=2e-3, atol=2e-4)
        assert found != [float(row["selectivity"]) for row in rows if row["network"] == f"{label} (labels shuffled)"]
    record = json.loads((tmp_path / "selectivity.json").read_text())
    assert record["settings"]["data"]["classes"] == ["class0", "class1", "class2"] and len(record["results"]) == 20
    assert record["results"][0]["channels"] == 8 and record["results"][0]["images"] == 12
    picture = pixels_of(tmp_path / "selectivity.png")
    assert picture.shape[0] > 600 and all(has_colour(picture, colour) for colour in COLORS[:4])


def test_activations_of_layers(tmp_path, data, checkpoints):
    words = ["--data", data, "--image", "class1/2.png", "--layer", "stages.0.0", "stages.1.1", "--output", tmp_path]
    assert run("activations", checkpoints[1], "--label", "a b", *words, "--channels", 16) == 0
    for layer in ("stages.0.0", "stages.1.1"):
        assert pixels_of(tmp_path / f"activations-a-b-{layer}.png").shape[1] > 900
        rows = rows_of(tmp_path / f"activations-a-b-{layer}.csv")
        assert len(rows) == 32 and sum(int(row["shown"]) for row in rows) == 16
    record = json.loads((tmp_path / "activations.json").read_text())
    assert record["settings"]["data"]["image"] == "class1/2.png" and len(record["results"]) == 2
    assert record["results"][1]["dead_share"] == pytest.approx(np.mean([int(row["dead"]) for row in rows]))


def test_reconstructions(tmp_path, data, checkpoints, capsys):
    words = ["--data", data, "--output", tmp_path, "--images", 3, "--batch-size", 2, "--seed", 1]
    assert run("reconstruct", *checkpoints, "--label", "with", "--label", "without", *words) == 0
    record = json.loads((tmp_path / "reconstruction.json").read_text())
    assert [r["mask_ratio"] for r in record["results"]] == [0.5, 0.5]
    rows = rows_of(tmp_path / "reconstruction.csv")
    assert len(rows) == 6 and {row["image"].partition("/")[0] for row in rows} == {"class0", "class1", "class2"}
    for result in record["results"]:
        # every image hides as many patches; the overall error is a sum in float32
        assert np.mean(result["mse_by_image"]) == pytest.approx(result["model_mse"], rel=1e-5)
    assert "each hidden patch's own mean colour" in capsys.readouterr().out
    picture = pixels_of(tmp_path / "reconstruction-with.png")
    assert (np.abs(picture - 128).max(-1) < 2).sum() > 10000  # the hidden patches
    assert not np.array_equal(picture, pixels_of(tmp_path / "reconstruction-without.png"))


def test_bundled_photographs(tmp_path, checkpoints):
    words = ["--photos", "--image", "coffee", "--output", tmp_path, "--layer", "stages.3.0"]
    assert run("activations", checkpoints[0], *words) == 0
    assert (tmp_path / "activations-default-checkpoint-3-stages.3.0.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cosine", "--data", "DATA"], "give at least one CHECKPOINT, or --random with --model"),
        (["cosine", "--random", "--data", "DATA"], "--random without a checkpoint needs --model"),
        (["cosine", "--random", "--model", "resnet", "--data", "DATA"], "--model must be one of"),
        (["cosine", "nowhere.pt", "--data", "DATA"], "nowhere.pt: there is no such file"),
        (["cosine", "ONE", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["cosine", "ONE", "--label", "a", "--label", "b", "--data", "DATA"], "once for each of the 1 checkpoints"),
        (["cosine", "ONE", "ONE", "--data", "DATA"], "--label must tell the checkpoints apart"),
        (["cosine", "ONE", "--data", "DATA", "--device", "cuda:77"], "--device cuda:77: cannot be used here"),
        (["cosine", "ONE", "--data", "DATA", "--backend", "cuda"], "--backend cuda: "),
        (["selectivity", "ONE", "--data", "DATA/class0"], "one subfolder of images for each class"),
        (["activations", "ONE", "--data", "DATA", "--layer", "stages.7.0"], "--layer must be a block from"),
        (["activations", "ONE", "--data", "DATA", "--image", "99"], "--image must be a name among 12 such as"),
        (["reconstruct", "CLASSIFIER", "--data", "DATA"], "has no decoder"),
        (["reconstruct", "ONE", "--data", "DATA", "--img-size", "100"], "must have sides that are multiples of 32"),
        (
            ["reconstruct", "ONE", "--data", "DATA", "--mask-ratio", "0.8"],
            "--mask-ratio 0.8 hides all 4 patches of 64x64",
        ),
        (["reconstruct", "ONE", "--data", "DATA", "--mask-ratio", "0"], "--mask-ratio 0 hides none of the 4 patches"),
        (["reconstruct", "ONE", "--data", "DATA", "--img-size", "32"], "expected --img-size of at least 64"),
        (["cosine", "CLASSIFIER", "--data", "DATA", "--ema"], "has no averaged weights, expected model_ema"),
        (["cosine", "CLASSIFIER", "--data", "DATA", "--model", "convnextv2_tiny"], "expected convnextv2_tiny"),
    ],
)
def test_errors_are_one_sentence(tmp_path, data, checkpoints, capsys, words, message):
    torch.save(network().state_dict(), tmp_path / "classifier.pt")
    places = {"DATA": str(data), "ONE": str(checkpoints[0]), "CLASSIFIER": str(tmp_path / "classifier.pt")}
    words = [places.get(word, word.replace("DATA/", f"{data}/")) for word in words]
    assert cli.main(["analyze", *words, "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: ANALYSIS"),
        (["cosine", "x.pt"], "one of the arguments --data --photos is required"),
        (["selectivity", "x.pt", "--photos"], "one of the arguments --data is required"),
        (["reconstruct", "--photos"], "required: CHECKPOINT"),
        (["cosine", "x.pt", "--photos", "--img-size", "16"], "of at least 32, got '16'"),
        (["cosine", "x.pt", "--photos", "--dead", "1"], "at least 0 and below 1, got '1'"),
    ],
)
def test_usage_errors(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_every_command_has_help(capsys):
    for name in ("cosine", "selectivity", "activations", "reconstruct"):
        with pytest.raises(SystemExit) as end:
            run(name, "--help")
        assert end.value.code == 0 and f"analyze {name} " in capsys.readouterr().out


def test_missing_package_is_named(tmp_path, data, checkpoints, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("cosine", checkpoints[0], "--data", data, "--output", tmp_path) == 1
    assert "error: analyze cosine needs matplotlib: pip install matplotlib" in capsys.readouterr().err
