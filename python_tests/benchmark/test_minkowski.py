"""MinkowskiEngine as a variant of Figure 6, against a stand-in true to its interface."""

import sys

import pytest
import torch
from helpers.sparse_engines import Fault, fake_minkowski

from convnextv2_kernels.benchmark import figure6, minkowski, step
from convnextv2_kernels.benchmark.correctness import check_fcmae
from convnextv2_kernels.benchmark.timing import Budget
from convnextv2_kernels.benchmark.variants import make_batch, make_dense, make_sparse
from convnextv2_kernels.cli.bench import main


@pytest.fixture
def small(monkeypatch):
    """Networks of one block a stage, so that the stand-in's plain convolutions take no time."""
    from convnextv2_kernels import sizes

    monkeypatch.setitem(sizes.CONFIGS, "convnextv2_atto", sizes.ModelConfig((1, 1, 1, 1), (4, 6, 8, 12)))


def install(monkeypatch, kind=None):
    for name, module in fake_minkowski(Fault(kind)).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(minkowski, "installed", lambda: True)


def make(dtype=torch.float32):
    batch = make_batch(2, 96, seed=0, dtype=dtype)
    sparse = make_sparse("convnextv2_atto", seed=0)
    (dense,) = make_dense(sparse, [figure6.COMMON])
    return sparse, batch, dense


def test_the_engine_computes_our_loss_and_gradients(small, monkeypatch):
    install(monkeypatch)
    sparse, batch, dense = make()
    variant, reason = minkowski.make_variant(sparse, batch, dense)
    assert (
        reason is None and not variant.ours and not variant.dense and variant.described()["engine"] == "MinkowskiEngine"
    )
    loss, pred = variant.forward(batch)
    expected, expected_pred = dense.forward(batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(pred, expected_pred, rtol=1e-4, atol=1e-5)
    assert check_fcmae(variant, [dense], batch)["results"] > 50
    # a step uses the parameters as they are, not copies
    with torch.no_grad():
        for parameter in variant.model.parameters():
            parameter.zero_()
    assert variant.forward(batch)[1].abs().max() == 0


@pytest.mark.parametrize("kind", ["taps", "numbers", "raises"])
def test_a_wrong_or_broken_engine_is_left_out_with_the_reason(small, monkeypatch, kind):
    install(monkeypatch, kind)
    variant, reason = minkowski.make_variant(*make())
    assert variant is None
    assert reason.startswith("RuntimeError: this engine" if kind == "raises" else "wrong: FCMAE step, MinkowskiEngine")


def test_the_engine_has_no_half_precision(small, monkeypatch):
    install(monkeypatch)
    assert minkowski.make_variant(*make(torch.bfloat16)) == (
        None,
        "it computes in float32 and float64, and the step in bfloat16",
    )


def test_figure_6_measures_it_where_it_is_installed(small, monkeypatch):
    install(monkeypatch)
    settings = figure6.Figure6Settings(
        batch_size=2, img_size=64, repeats=3, models=("convnextv2_atto",), compile=False, peak=False
    )
    size = figure6.measure_size("convnextv2_atto", settings, Budget(None), step.ignore, step.ignore)
    row = size["variants"]["MinkowskiEngine"]
    assert row["engine"] == "MinkowskiEngine" and row["baseline"] is None and row["median_ms"] > 0
    assert size["ours"].startswith("sparse") and size["ratios"]["fastest_dense"].startswith("dense")
    assert figure6.complete(size, settings)
    del size["variants"]["MinkowskiEngine"]
    assert not figure6.complete(size, settings)  # measured before it was installed


def test_without_it_the_papers_figures_are_said_to_be_quoted(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minkowski, "installed", lambda: False)
    arguments = ["--figure6", "--img-size", "64", "--batch-size", "2", "--repeats", "3", "--device", "cpu"]
    arguments += ["--no-compile", "--no-peak", "--models", "atto", "--output", str(tmp_path)]
    assert main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "MinkowskiEngine: not installed; the paper's figures for it" in told and "are quoted, not measured" in told


def test_an_engine_that_does_not_import_is_named(monkeypatch):
    monkeypatch.setattr(minkowski, "installed", lambda: True)
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    note = minkowski.described()["note"]
    assert note.startswith("does not import (") and note.endswith(minkowski.QUOTED)
