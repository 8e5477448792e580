"""kNN and linear probe through the command line, against the same computed by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers.networks import network
from helpers.pictures import class_folder
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from convnextv2_kernels import use_backend
from convnextv2_kernels.analysis import commands
from convnextv2_kernels.backends import forced
from convnextv2_kernels.cli import main
from convnextv2_kernels.data.images import normalize


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder of three classes with twelve pictures each, a network of its own, and the crops of it all."""
    root = tmp_path_factory.mktemp("probing")
    folder = class_folder(root / "train", each=12)
    model = network()
    torch.save({"model": model.state_dict(), "config": {"img_size": [64, 64]}}, root / "network.pt")
    return root, folder, model


def features(model, folder):
    """Resized to 73 (64 / (224/256)), cut to 64, averaged over the last stage."""
    rows, labels = [], []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path)
        scale = 73 / min(image.size)
        image = image.resize([max(73, int(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - 64) / 2) for side in image.size)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + 64, top + 64))))
        rows.append(model.run_stages(normalize(pixels[None])).mean((1, 2))[0].detach())
        labels.append(int(path.parent.name[-1]))
    return torch.stack(rows).double().numpy(), np.array(labels)


def test_both_agree_with_hand_and_library(setting, tmp_path, capsys):
    root, folder, model = setting
    words = [str(root / "network.pt"), "--random", "--data", str(folder), "--val", str(folder)]
    words += ["--output", str(tmp_path)]
    assert main(["analyze", "knn", *words, "--k", "5"]) == 0
    assert main(["analyze", "probe", *words, "--c", "0.1"]) == 0
    rows, labels = features(model.eval(), folder)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = unit @ unit.T
    hits = 0
    for query in range(len(rows)):
        best = np.argsort(-similarity[query])[:5]
        votes = np.bincount(labels[best], np.exp(similarity[query, best] / 0.07), minlength=3)
        hits += votes.argmax() == labels[query]
    knn = json.loads((tmp_path / "knn.json").read_text())
    # one image may sit on an edge that float32 and float64 see differently
    assert knn["results"][0]["top1"] == pytest.approx(100 * hits / 36, abs=100 / 36 + 1e-9)
    assert knn["results"][0]["k"] == 5 and knn["settings"]["data"]["images"] == 36
    scaled = StandardScaler().fit_transform(rows)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, labels).score(scaled, labels)
    probe = json.loads((tmp_path / "probe.json").read_text())
    assert probe["results"][0]["top1"] == pytest.approx(100 * expected, abs=100 / 36 + 1e-9)
    with (tmp_path / "probe.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["network"] for row in table][1] == "untrained" and table[0]["converged"] == "True"
    assert "top-1" in capsys.readouterr().out


def test_share_is_held_out(setting, tmp_path):
    root, folder, _ = setting
    words = [str(root / "network.pt"), "--data", str(folder), "--val-share", "0.25", "--output", str(tmp_path)]
    assert main(["analyze", "knn", *words]) == 0
    result = json.loads((tmp_path / "knn.json").read_text())
    assert result["results"][0]["images"] == 9 and result["settings"]["data"]["training_images"] == 27
    assert result["settings"]["img_size"] == [64, 64]


def test_averaged_weights_and_labels(setting, tmp_path, capsys):
    """--ema takes the averaged weights: the same results as a file of those alone; --label names the networks."""
    root, folder, model = setting
    other = network(seed=1)
    config = {"img_size": [64, 64]}
    torch.save({"model": other.state_dict(), "model_ema": model.state_dict(), "config": config}, tmp_path / "both.pt")
    common = ["--data", str(folder), "--val-share", "0.5", "--seed", "3", "--output", str(tmp_path / "out")]
    seen = []
    for words in (
        [str(tmp_path / "both.pt"), "--ema"],
        [str(root / "network.pt")],
        [str(tmp_path / "both.pt"), "--label", "own"],
    ):
        assert main(["analyze", "probe", *words, *common, "--C", "0.01"]) == 0
        seen.append(json.loads((tmp_path / "out" / "probe.json").read_text()))
    results = [[result["results"][0][key] for key in ("top1", "iterations")] for result in seen]
    assert results[0] == results[1] != results[2]
    assert [result["networks"][0]["averaged_weights"] for result in seen] == [True, False, False]
    assert seen[2]["results"][0]["network"] == "own"
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    top1, iterations = results[2]
    assert ["own", f"{top1:.2f}", "100.00", "18", "converged", "after", str(iterations), "iterations"] in printed


def test_kernels_are_those_asked_for(setting, tmp_path, monkeypatch):
    """--backend, else what the caller or the environment chose; the result says which."""
    root, folder, _ = setting
    seen = []

    def spy(*args, **kwargs):
        seen.append(forced())
        return extract(*args, **kwargs)

    extract = commands.extract_features
    monkeypatch.setattr(commands, "extract_features", spy)
    words = ["analyze", "knn", str(root / "network.pt"), "--data", str(folder), "--output", str(tmp_path)]
    for outer, more, expected in (("reference", [], "reference"), ("auto", ["--backend", "reference"], "reference")):
        seen.clear()
        with use_backend(outer):
            assert main([*words, *more]) == 0
        assert set(seen) == {expected}
        assert json.loads((tmp_path / "knn.json").read_text())["versions"]["backend"] == expected


def test_table_tells_what_fell_short():
    row = {"network": "a", "top1": 50.0, "top5": 100.0, "images": 4}
    note = "k = 20 is more than the 3 training images; k = 3 was used"
    lines = commands.table([{**row, "k": 3, "note": note}, {**row, "network": "longer", "k": 3, "note": note}])
    assert [line.split() for line in lines[1:3]] == [[n, "50.00", "100.00", "4", "3"] for n in ("a", "longer")]
    assert lines[3:] == [f"note: {note}"] and len({len(line) for line in lines[:3]}) == 1
    lines = commands.table([{**row, "converged": False, "iterations": 1}])
    assert lines[1].endswith("stopped after 1 iteration") and "--max-iter" in lines[2]


def test_errors_are_one_sentence(setting, tmp_path, capsys):
    root, folder, _ = setting
    single = class_folder(tmp_path / "single", each=1)
    absent = "cpu" if torch.cuda.is_available() else "cuda"
    for words, message in (
        (["knn", "--data", str(folder)], "give at least one CHECKPOINT"),
        (["probe", str(root / "network.pt"), "--data", str(folder / "class0")], "directly in the folder"),
        (["knn", str(root / "network.pt"), "--data", str(folder), "--val", str(root)], "'train' is none of the 3"),
        (["knn", str(root / "network.pt"), "--data", str(single)], "none is left to test on"),
        (["probe", str(root / "network.pt"), "--data", str(folder), "--ema"], "averaged weights"),
        (["knn", str(root / "network.pt"), "--data", str(folder), "--backend", absent], f"--backend {absent}: "),
    ):
        assert main(["analyze", *words, "--output", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
