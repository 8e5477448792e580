"""The examples run as they stand, on small inputs."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(monkeypatch, capsys, name: str, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_fuse_timm(monkeypatch, capsys, tmp_path):
    saved = tmp_path / "weights.pt"
    options = ("--compare", "--steps", "2", "--img-size", "64", "--batch-size", "2", "--output", str(saved))
    out = run(monkeypatch, capsys, "fuse_timm.py", *options)
    assert "fused 12 of 12 blocks of ConvNeXt" in out and saved.exists()
    fused, plain = (line.rpartition("losses ")[2].split(", ") for line in out.splitlines() if "losses" in line)
    assert [float(x) for x in fused] == pytest.approx([float(x) for x in plain], abs=2e-3)


def test_masked_features(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(picture)
    out = run(monkeypatch, capsys, "masked_features.py", "--image", str(picture), "--img-size", "96")
    assert "3 of 9 patches are visible; features [3, 1, 1, 320]" in out
    assert "hidden pixels set to NaN change nothing: True" in out


def test_fcmae_to_timm(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "fcmae_to_timm.py")
    assert "fused 12 of 12 blocks" in out and "kept initial: head.norm.weight" in out
    assert float(out.rpartition("differ by up to ")[2]) < 1e-4
