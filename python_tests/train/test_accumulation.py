"""A step computed in parts is the step computed as a whole."""

import json

import pytest
import torch
from helpers.training import losses, run_tiny

from convnextv2_kernels.train.trainer import Spread


def test_parts_add_up_to_the_whole(tmp_path, sources):
    for name, accumulate in (("whole", 1), ("parts", 4)):
        (tmp_path / name).mkdir()
        settings = {"batch_size": 4, "precision": "float64", "split": Spread(accumulate=accumulate)}
        run_tiny(tmp_path / name, sources, **settings)
    whole, parts = (torch.tensor([loss for _, loss, _ in losses(tmp_path / name)]) for name in ("whole", "parts"))
    # float64, only the order of sums differs
    torch.testing.assert_close(parts.double(), whole.double(), rtol=1e-6, atol=0)
    a, b = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("whole", "parts"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-13)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-11)
