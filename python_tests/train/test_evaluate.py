import math

import numpy as np
import pytest
import torch

from convnextv2_kernels.train.evaluate import TopK


def sample(count=37, classes=9, seed=0):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(count, classes)) * 2, rng.integers(0, classes, count)
    labels[rng.random(count) < 0.2] = -1
    return logits, labels


def brute_force(logits, labels, ks):
    rows = [(row, label) for row, label in zip(logits, labels, strict=True) if label >= 0]
    losses = [math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in rows]
    result = {}
    for k in ks:
        hits = sum(sorted(row, reverse=True).index(row[label]) < k for row, label in rows)
        result[f"top{k}"] = 100 * hits / len(rows)
    return {**result, "loss": sum(losses) / len(rows), "images": len(rows)}


def check(result, expected):
    assert list(result) == list(expected) and result["images"] == expected["images"]
    for key in expected:
        # accuracies are counts; a float32 cross entropy of logits below 8 is good to 1e-6
        assert result[key] == pytest.approx(expected[key], rel=1e-6 if key == "loss" else 1e-14)


def updated(logits, labels, meter=None, step=10):
    meter = meter or TopK()
    for begin in range(0, len(labels), step):
        part = slice(begin, begin + step)
        meter.update(torch.from_numpy(logits[part]).float(), torch.from_numpy(labels[part]))
    return meter


@pytest.mark.parametrize("ks", [(1, 5), (3,), (1, 2, 9)])
def test_matches_brute_force_over_ragged_batches(ks):
    logits, labels = sample()
    check(updated(logits, labels, TopK(ks)).result(), brute_force(logits, labels, ks))


def test_label_minus_one_is_left_out():
    logits, labels = sample()
    seen = labels >= 0
    assert 0 < seen.sum() < len(seen)
    assert updated(logits, labels).result() == pytest.approx(updated(logits[seen], labels[seen]).result(), rel=1e-6)


def test_k_beyond_the_classes_counts_as_all():
    logits, labels = sample(classes=3)
    result = updated(logits, labels).result()
    assert result["top5"] == 100 and result["top1"] < 100
    check(result, brute_force(logits, labels, (1, 5)))


def test_counts_of_processes_add_up():
    logits, labels = sample()
    whole = updated(logits, labels, step=5)
    parts = [updated(logits[i], labels[i], step=5) for i in (slice(0, 20), slice(20, None))]
    total = sum(part.counts() for part in parts)
    assert total.dtype == torch.float64 and total.shape == (4,)
    # float64 sums of the same float32 losses
    assert TopK().merge(total).result() == pytest.approx(whole.result(), rel=1e-14)
    assert parts[0].merge(parts[1].counts()).result() == pytest.approx(whole.result(), rel=1e-14)
    copy = whole.counts()
    copy.zero_()
    assert whole.result()["images"] == int((labels >= 0).sum())


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = sample(200)
    rounded = torch.from_numpy(logits).bfloat16()
    meter = TopK((1,))
    meter.update(rounded, torch.from_numpy(labels))
    expected = brute_force(rounded.double().numpy(), labels, (1,))
    assert meter.result()["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_nothing_counted_is_nan():
    meter = TopK()
    meter.update(torch.randn(2, 3), torch.tensor([-1, -1]))
    result = meter.result()
    assert result.pop("images") == 0 and all(math.isnan(value) for value in result.values())


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"ks must be numbers of at least 1, got \(0, 5\)"):
        TopK((0, 5))
    with pytest.raises(ValueError, match=r"counts must have shape \(4,\), got \(3,\)"):
        TopK().merge(torch.zeros(3))
