import sys
import types

import pytest
from helpers.training import losses
from safetensors.torch import load_file

from convnextv2_kernels.cli import main


@pytest.fixture
def comparison(monkeypatch):
    """Stands in for the measurement, which has tests of its own; records what it was asked for."""
    asked = []

    def compare_fcmae_step(model_name, batch_size, img_size=224, repeats=3):
        asked.append((model_name, batch_size, img_size))
        return {
            "sparse_ms": 100.0,
            "dense_ms": 512.0,
            "dense_variant": "dense channels_last conv1x1 eager",
            "time_ratio": 5.12,
            "sparse_bytes": 3 * 2**20,
            "dense_bytes": 90 * 2**20,
            "bytes_ratio": 30.0,
        }

    module = types.ModuleType("convnextv2_kernels.benchmark")
    module.compare_fcmae_step = compare_fcmae_step
    monkeypatch.setitem(sys.modules, "convnextv2_kernels.benchmark", module)
    return asked


def demo(output, *more):
    return main(["pretrain", "--demo", "--output", str(output), "--max-steps", "2", "--batch-size", "2", *more])


def test_demo_spares_the_folder_of_a_run(tmp_path, capsys):
    (tmp_path / "checkpoint-5.pt").touch()
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    assert demo(tmp_path) == 1
    assert "holds checkpoints of another run" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_demo_ends_with_picture_numbers_and_table(tmp_path, comparison, capsys):
    assert demo(tmp_path / "new" / "a") == 0
    text = capsys.readouterr().out
    assert "224 px, 61 % hidden (30 of 49 patches)" in text
    assert "the model" in text and "mean colour of the image's visible pixels" in text
    assert all(part in text for part in ("100 ms", "512 ms", "5.1x", "3.0 MiB", "90.0 MiB", "30.0x"))
    assert comparison == [("convnextv2_atto", 2, 224)]
    folder = tmp_path / "new" / "a"
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {
        "config.json",
        "encoder.safetensors",
        "log.jsonl",
        "reconstruction.png",
    }
    assert "stages.0.0.dwconv.weight" in load_file(folder / "encoder.safetensors")
    # Again, into the same folder, with workers: the same run from its start.
    first = losses(folder)
    assert demo(folder, "--workers", "1") == 0
    assert losses(folder) == first and len(first) == 2
