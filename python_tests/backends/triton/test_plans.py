"""Which products are fused: the committed table, measured plans on disk, and the tuner that measures them."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from convnextv2_kernels import backends
from convnextv2_kernels.cli import main
from convnextv2_kernels.cli import tune as tuning

pytest.importorskip("triton")

from convnextv2_kernels.backends.triton import gemm_tiles, plans
from convnextv2_kernels.backends.triton.plans import KERNELS, UNFUSED, Plan, Shape, Tile
from convnextv2_kernels.params import Segments
from convnextv2_kernels.settings import Settings, current

from .available import needs_kernels

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def shape(dtype=BF16, width=96, rows_each=1216) -> Shape:
    return Shape(dtype, width, 4 * width, width, rows_each)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder of measured plans, for a machine that is none."""
    monkeypatch.setattr(current, "cache", tmp_path)
    monkeypatch.setattr(plans, "machine", lambda index=None: {"gpu": "Test GPU 1", "driver": "1"})
    plans._read.cache_clear()
    plans._choose.cache_clear()
    yield tmp_path
    plans._read.cache_clear()
    plans._choose.cache_clear()


@pytest.mark.parametrize("family", [name for name in plans.table() if name != "interpreter"])
def test_the_committed_table(family):
    rows = plans.table()[family]
    for row in rows:
        assert set(row) <= {"bits", "width", "rows_each", "source", *KERNELS}
        for name in KERNELS:
            tile = Tile(*row[name]) if name in row else None
            assert tile is None or all(side & (side - 1) == 0 for side in tile[:4] if side), f"{name}: {tile}"
    with plans.assumed_family(family):
        assert plans.choose(shape()).forward_fused
        assert plans.choose(shape(dtype=F16, width=384, rows_each=76)).forward_fused
        # where the library is faster, or exact
        for other in (shape(width=768, rows_each=19), shape(dtype=F32), shape(dtype=F64)):
            assert plans.choose(other) == UNFUSED


def test_wide_blocks_never_have_the_backward_that_keeps_rows_in_registers():
    for family in plans.table():
        with plans.assumed_family(family):
            assert not plans.choose(shape(width=320)).backward_fused


def test_the_variable_overrides_the_table(monkeypatch, folder):
    monkeypatch.setattr(plans, "family", lambda index=None: "sm_90")
    assert plans.choose(shape()).forward_fused and not plans.choose(shape(width=1024)).forward_fused
    monkeypatch.setattr(current, "triton_gemms", "library")
    assert plans.choose(shape()) == UNFUSED
    monkeypatch.setattr(current, "triton_gemms", "fused")
    assert plans.choose(shape(width=1024)).forward_fused and not plans.choose(shape(width=1024)).backward_fused
    assert plans.choose(shape(dtype=F64)) == UNFUSED
    with pytest.raises(ValueError, match="PRODUCTS must be one of auto, fused, library, got 'fastest'"):
        Settings.read({"CONVNEXTV2_KERNELS_TRITON_PRODUCTS": "fastest"})


def test_measured_plans_come_first_and_stay_on_disk(monkeypatch, folder):
    monkeypatch.setattr(plans, "family", lambda index=None: "sm_90")
    assert plans.choose(shape()).source != "measured by tune"
    measured = Plan(hidden=Tile(64, 32, 0, 4, 2), products=Tile(64, 64, 0, 4, 2), source="measured by tune")
    file = plans.write({shape(): measured, shape(width=384): UNFUSED})
    assert plans.choose(shape()) == measured
    assert plans.choose(shape(rows_each=1300)) == measured  # as many rows to a factor of two
    assert plans.choose(shape(rows_each=3136)).source != "measured by tune"
    assert plans.choose(shape(width=384)) == UNFUSED
    assert json.loads(file.read_text())["machine"]["gpu"] == "Test GPU 1"
    plans.write({shape(width=40): UNFUSED})
    assert len(json.loads(file.read_text())["plans"]) == 3, "earlier plans are kept"


def test_another_gpu_or_driver_has_another_file(monkeypatch, folder):
    before = plans.path()
    monkeypatch.setattr(plans, "machine", lambda index=None: {"gpu": "Test GPU 1", "driver": "2"})
    assert plans.path() != before


def test_a_damaged_file_is_a_warning(monkeypatch, folder):
    monkeypatch.setattr(plans, "family", lambda index=None: "sm_90")
    plans.path().write_text('{"plans": [{"key": 1')
    with pytest.warns(UserWarning, match="built-in table is used: .* is not valid JSON"):
        assert plans.choose(shape()).forward_fused


def test_shapes_of_models():
    found = tuning.mlp_shapes(["convnextv2_tiny"], (224, 224), 0.6, BF16)
    assert [(s.width, s.rows_each) for s in found] == [(96, 1216), (192, 304), (384, 76), (768, 19), (512, 49)]
    dense = tuning.mlp_shapes(["convnextv2_atto", "convnextv2_atto"], (224, 192), None, F16)
    assert [(s.width, s.rows_each) for s in dense] == [(40, 2688), (80, 672), (160, 168), (320, 42)]


@needs_kernels
def test_shapes_of_models_are_those_a_training_step_asks_for(monkeypatch):
    """Encoder and decoder of tiny, pre-training at 224 pixels, without computing anything."""
    import convnextv2_kernels as ck
    from convnextv2_kernels.backends.triton import launch

    asked = set()
    monkeypatch.setattr(plans, "choose", lambda shape, index=None: asked.add(shape) or UNFUSED)
    model = ck.models.FCMAE((1, 1, 1, 1), (96, 192, 384, 768), img_size=224)
    with torch.no_grad(), launch.recorded_launches(), ck.use_backend("triton"):
        model(torch.zeros(1, 3, 224, 224, device=backends.triton.DEVICE), ck.random_mask(1, (7, 7), 0.6))
    assert asked == set(tuning.mlp_shapes(["convnextv2_tiny"], (224, 224), 0.6, F32))


SMALL = {name: (Tile(16, 32, 16, 4, 2), Tile(32, 32, 32, 4, 2)) for name in KERNELS}


@needs_kernels
def test_tuning_measures_every_way_and_keeps_the_fastest(folder):
    small = Shape(F32, 24, 32, 24, 40)
    said = []
    findings = tuning.tune([small], 3, said.append, repetitions=1, candidates=SMALL)
    finding = findings[small]
    assert set(finding.forward) == {"library", "fused"} and set(finding.backward) == {"library", "fused", "weight"}
    plan = finding.plan
    assert plan.forward_fused == (finding.forward["fused"] < 0.97 * finding.forward["library"])
    fastest = min(finding.backward, key=finding.backward.get)
    clear = finding.backward[fastest] < 0.97 * finding.backward["library"]
    assert plan.backward_fused == (clear and fastest == "fused")
    assert (plan.weight is not None) == (clear and fastest == "weight")
    assert "C = 24" in said[0] and "*" in said[0] and str(folder) in said[1]
    assert plans.measured(small) == plan


@needs_kernels
def test_the_ways_that_are_timed_compute_the_same():
    from convnextv2_kernels.backends.triton.tune import Case

    case = Case(Shape(F32, 24, 32, 24, 40), 3, backends.triton.DEVICE)
    k = backends.get("triton")
    tiles = {name: tile for name, (tile, *_) in SMALL.items()}
    forward = {name: call() for name, call in case.variants("forward", k, tiles).items()}
    for got, expected in zip(forward["fused"][:2], forward["library"][:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    backward = {name: call() for name, call in case.variants("backward", k, tiles).items()}
    torch.testing.assert_close(backward["fused"].dx, backward["library"].dx, rtol=1e-4, atol=1e-5)
    assert torch.equal(backward["weight"].dx, backward["library"].dx)


def test_the_command_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(tuning, "unavailable", lambda: "tune needs a GPU, and PyTorch sees none on this machine")
    assert main(["tune"]) == 1
    assert capsys.readouterr().err == "error: tune needs a GPU, and PyTorch sees none on this machine\n"


def test_the_command_names_an_unknown_model(capsys, monkeypatch):
    monkeypatch.setattr(tuning, "unavailable", lambda: None)
    assert main(["tune", "--model", "convnextv2_mini"]) == 1
    assert "got 'convnextv2_mini'" in capsys.readouterr().err


def test_tiles_that_would_span_too_many_images_are_left_to_the_library():
    cut = gemm_tiles.partition(64 * 4, Segments(None, 1, 64), 128)
    assert cut.span > gemm_tiles.MOST_IMAGES


def test_info_shows_what_is_fused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends.triton, "INTERPRETED", False)
    monkeypatch.setattr(backends.triton, "unsupported_reason", lambda *_: None)
    with plans.assumed_family("sm_90"):
        monkeypatch.setattr(plans, "family", lambda index=None: "sm_90")
        lines = importlib.import_module("convnextv2_kernels._info")._triton_lines()
    assert "plans of sm_90" in lines[0]
    assert "forward fused, backward fused (predicted, not measured)" in lines[1]
    assert "forward library, backward library (library)" in lines[4]
