"""kNN and linear probe through the command line, against the same computed by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from convnextv2_kernels.cli import main
from convnextv2_kernels.train.data import normalize

from .networks import class_folder, network


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
    with open(tmp_path / "probe.csv", newline="") as file:
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


def test_errors_are_one_sentence(setting, tmp_path, capsys):
    root, folder, _ = setting
    for words, message in (
        (["knn", "--data", str(folder)], "give at least one CHECKPOINT"),
        (["probe", str(root / "network.pt"), "--data", str(folder / "class0")], "directly in the folder"),
        (["knn", str(root / "network.pt"), "--data", str(folder), "--val", str(root)], "'train' is none of the 3"),
    ):
        assert main(["analyze", *words, "--output", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
