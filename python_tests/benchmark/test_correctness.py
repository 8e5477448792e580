import math
from dataclasses import replace

import pytest
import torch

from convnextv2_kernels.benchmark import correctness, step
from convnextv2_kernels.benchmark.baseline import baselines
from convnextv2_kernels.benchmark.variants import make_batch, make_dense, make_sparse
from convnextv2_kernels.cli import bench as cli

ATTO = "convnextv2_atto"


@pytest.fixture(scope="module")
def variants():
    sparse = make_sparse(ATTO, seed=0)
    return sparse, make_dense(sparse, baselines())


def broken(sparse, change):
    def run(images, mask):
        loss, pred = sparse.run(images, mask)[:2]
        return change(loss, pred)

    return replace(sparse, run=run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_where_results_agree(variants, dtype):
    sparse, dense = variants
    summary = correctness.check_fcmae(sparse, dense, make_batch(2, 64, seed=0, dtype=dtype))
    assert summary["sparse_error"] <= summary["bound"]
    assert summary["results"] == 2 + len(list(sparse.model.parameters()))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda loss, pred: (loss * (1 + 1e-4), pred), "loss"),
        (lambda loss, pred: (loss, pred + 1e-3 * pred.std()), "pred"),
        (lambda loss, pred: (loss * math.nan, pred), "loss"),
    ],
)
def test_small_errors_are_caught(variants, change, name):
    sparse, dense = variants
    with pytest.raises(correctness.CorrectnessError, match="disagree with masked dense") as caught:
        correctness.check_fcmae(broken(sparse, change), dense, make_batch(1, 64, seed=0))
    assert name in str(caught.value) or "gradient of" in str(caught.value)


def test_a_wrong_gradient_is_caught(variants):
    sparse, dense = variants
    weight = sparse.model.encoder.stages[0][0].dwconv.weight
    handle = weight.register_hook(lambda grad: grad * (1 + 1e-4))
    try:
        with pytest.raises(correctness.CorrectnessError, match="gradient of encoder.stages.0.0.dwconv.weight"):
            correctness.check_fcmae(sparse, dense, make_batch(1, 64, seed=0))
    finally:
        handle.remove()


def test_a_missing_gradient_is_caught(variants):
    sparse, dense = variants
    wrong = broken(sparse, lambda loss, pred: (sparse.model.mask_token.sum(), pred))
    with pytest.raises(correctness.CorrectnessError, match="has no gradient"):
        correctness.check_fcmae(wrong, dense, make_batch(1, 64, seed=0))


def test_the_floor_grows_with_rows_and_dtype():
    one, four = (correctness.rounding_floor(rows, torch.float32) for rows in (1, 4))
    assert four == 2 * one == torch.finfo(torch.float32).eps
    assert correctness.rounding_floor(1, torch.bfloat16) > torch.finfo(torch.bfloat16).eps


def test_nan_is_the_worst_result():
    rows = [
        correctness.Comparison("good", 1e-8, 1e-7, 1e-6),
        correctness.Comparison("bad", math.nan, 1e-7, 1e-6),
        correctness.Comparison("off", 1e-5, 1e-7, 1e-6),
    ]
    with pytest.raises(correctness.CorrectnessError, match="2 of 3"):
        correctness.require(rows, "x")


def test_wrong_results_time_nothing_and_exits_with_1(monkeypatch, capsys, tmp_path):
    def wrong(model_name, seed, device):
        return broken(make_sparse(model_name, seed), lambda loss, pred: (2 * loss, pred))

    def no_timing(*args):
        raise AssertionError("timed after a failed check")

    monkeypatch.setattr(step, "make_sparse", wrong)
    monkeypatch.setattr(step, "time_interleaved", no_timing)
    arguments = ["--quick", "--img-size", "64", "--batch-size", "1", "--output", str(tmp_path)]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert "correctness check: FCMAE step" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
