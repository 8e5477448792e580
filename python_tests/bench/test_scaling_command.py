import csv
import json

import pytest

from bench.__main__ import main
from bench.scaling import measure as scaling
from convnextv2_kernels.benchmark.variants import SPARSE

TINY = ["--img-size", "64", "--batch-size", "1", "--repeats", "2", "--device", "cpu"]
ALONE = [*TINY, "--no-dense", "--img-sizes", "--mask-ratios"]


def run(output, *arguments):
    return main(["scaling", *arguments, "--output", str(output)])


def read(output):
    return json.loads((output / "scaling.json").read_text())


@pytest.mark.thorough
def test_a_run_leaves_json_csv_and_picture(tmp_path, capsys):
    axes = ["--batch-sizes", "1", "2", "3", "--img-sizes", "32", "64", "--mask-ratios", "0"]
    assert run(tmp_path, *TINY, *axes) == 0
    result = read(tmp_path)
    assert result["kind"] == "scaling" and result["correctness"]["results"] > 50
    by_axis = {series["axis"]: series for series in result["series"]}
    assert list(by_axis) == list(scaling.AXES)
    assert by_axis["img_size"]["left_out"] == {"batch 1, 32 px, mask ratio 0.6": "no patch is visible"}
    batch = by_axis["batch_size"]
    assert batch["control"]["of"].startswith("dense, batch 3") and batch["control"]["ratio"] > 0
    assert [point["visible_pixels"] for point in batch["points"]] == [1024, 2048, 3072]
    for point in batch["points"]:
        ours, dense = point["variants"][SPARSE], point["variants"][scaling.DENSE]
        assert len(ours["samples_ms"]) == len(dense["samples_ms"]) == 2
        assert ours["saved_bytes"] < dense["saved_bytes"] and ours["working_bytes"] > 0
        assert dense["hidden"] == {}
        assert point["saved_by_encoder_bytes"] < ours["saved_bytes"]
    # Bytes are counted, not timed: over the batch they are proportional but for a few integers.
    saved = batch["fit"]["saved_bytes"]
    assert saved["linear"] is True and saved["exponent"] == pytest.approx(1, abs=0.01)
    largest = batch["points"][-1]
    assert largest["ideal"]["median_ms"] == pytest.approx(largest["variants"][SPARSE]["median_ms"])
    assert batch["hidden_chunk"]["bounded"] is False  # three tiny images fit in a chunk
    assert by_axis["mask_ratio"]["fit"]["median_ms"] is None
    rows = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    assert len(rows) == 2 * (3 + 1 + 1)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "FCMAE step by mask ratio" in out and "left out: batch 1, 32 px" in out
    assert str(tmp_path) not in (tmp_path / "scaling.json").read_text()


def test_only_missing_points_are_measured(tmp_path, monkeypatch, capsys):
    asked = []
    measure = scaling.measure_axis

    def recorded(points, *rest):
        asked.append([point.batch_size for point in points])
        return measure(points, *rest)

    monkeypatch.setattr(scaling, "measure_axis", recorded)
    assert run(tmp_path, *ALONE, "--batch-sizes", "2", "1") == 0
    before = read(tmp_path)["series"][0]["points"]
    assert run(tmp_path, *ALONE, "--batch-sizes", "1", "2", "3") == 0
    assert asked == [[1, 2], [3]]
    (series,) = read(tmp_path)["series"]
    kept = [{key: value for key, value in point.items() if key != "ideal"} for point in series["points"]]
    assert kept[:2] == [{key: value for key, value in point.items() if key != "ideal"} for point in before]
    assert run(tmp_path, *ALONE, "--batch-sizes", "3", "1") == 0
    assert len(asked) == 2
    assert len(read(tmp_path)["series"][0]["points"]) == 3
    assert run(tmp_path, *ALONE, "--batch-sizes", "1", "--seed", "1") == 2
    assert "was measured with seed 0, this run has 1" in capsys.readouterr().err


def test_spent_budget_names_what_it_left_out(tmp_path, capsys):
    assert run(tmp_path, *ALONE, "--batch-sizes", "1", "2", "--time-budget", "0.001") == 0
    (series,) = read(tmp_path)["series"]
    assert series["points"] == []
    assert series["left_out"]["batch 2, 64 px, mask ratio 0.6"] == "time budget"
    assert "left out: batch 2, 64 px, mask ratio 0.6: time budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "1", "0"], "expected a whole number above 0, got '0'"),
        (["--img-sizes", "100"], "expected a side in pixels, a multiple of 32, got '100'"),
        (["--mask-ratios", "1.0"], "expected a number of at least 0 and below 1, got '1.0'"),
        (["--model", "giant"], "expected one of convnextv2_atto"),
        (["--backend", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["scaling", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_backend_that_cannot_serve(tmp_path, capsys):
    assert run(tmp_path, "--device", "cpu", "--backend", "cuda") == 2
    assert "--backend is cuda, but" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_points_come_cheapest_first_and_once():
    settings = scaling.ScalingSettings(batch_size=2, img_size=224)
    points = scaling.points_of("mask_ratio", [0.0, 0.9, 0.6, 0.6], settings)
    assert [point.mask_ratio for point in points] == [0.9, 0.6, 0.0]
    assert [point.visible for point in points] == [2 * int(49 * (1 - ratio)) for ratio in (0.9, 0.6, 0.0)]
    assert all(point.patches == 98 for point in points)
