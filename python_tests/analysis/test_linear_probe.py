import sys

import numpy as np
import pytest
import torch

from convnextv2_kernels.analysis.linear_probe import linear_probe
from convnextv2_kernels.errors import UserError

pytest.importorskip("sklearn")


def blobs(count, classes=7, width=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(123).normal(size=(classes, width))
    labels = rng.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    features = (centres[labels] + 0.8 * rng.normal(size=(count, width))) * [1, 10, 0.1, 1, 1, 1][:width] + 3
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def gradient_descent(train, train_labels, features, C):
    """Scores of the same problem, solved in float64 by PyTorch's L-BFGS: sum of losses + |W|^2 / 2C."""
    mean, std = train.double().mean(0), train.double().std(0, unbiased=False)
    x, queries = (train.double() - mean) / std, (features.double() - mean) / std
    classes = int(train_labels.max()) + 1
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, train_labels, reduction="sum")
        loss = loss + (weight**2).sum() / (2 * C)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (queries @ weight.T + bias).detach()


@pytest.mark.parametrize("C", [0.01, 1.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_matches_an_independent_solver(C, classes):
    train, labels = blobs(150, classes)
    features, wanted = blobs(80, classes, seed=1)
    result = linear_probe(train, labels, features, wanted, C=C)
    scores = gradient_descent(train, labels, features, C)
    best = scores.topk(min(5, classes), dim=1).indices == wanted[:, None]
    # The solvers stop at slightly different weights; a query at the boundary of two classes may fall to either.
    assert abs(result.top1 - 100 * best[:, 0].double().mean().item()) <= 100 / 80
    assert abs(result.top5 - 100 * best.any(1).double().mean().item()) <= 100 / 80
    assert result.converged and result.images == 80 and 1 <= result.iterations < 1000
    assert 100 / classes < result.top1 < 100


def test_failure_to_converge_is_reported():
    train, labels = blobs(100)
    result = linear_probe(train, labels, train, labels, C=1e4, max_iter=2)
    assert not result.converged and result.iterations == 2


def test_a_class_that_was_not_trained_on_is_never_right():
    train, labels = blobs(100, classes=3)
    labels = torch.tensor([1, 4, 6])[labels]  # numbers with gaps
    wrong = linear_probe(train, labels, train, torch.zeros_like(labels))
    assert wrong.top1 == wrong.top5 == 0
    right = linear_probe(train, labels, train, labels)
    assert right.top1 > 60 and right.top5 == 100


def test_a_constant_feature_does_no_harm():
    train, labels = blobs(100)
    padded = torch.cat([train, torch.full((100, 1), 2.5)], dim=1)
    assert linear_probe(padded, labels, padded, labels).top1 == linear_probe(train, labels, train, labels).top1


def test_missing_scikit_learn_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    train, labels = blobs(20)
    with pytest.raises(UserError, match="needs scikit-learn.*pip install scikit-learn"):
        linear_probe(train, labels, train, labels)


def test_bad_arguments_are_named():
    train, labels = blobs(20)
    with pytest.raises(ValueError, match="C must be greater than 0, got 0"):
        linear_probe(train, labels, train, labels, C=0)
    with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
        linear_probe(train, labels, train, labels, max_iter=0)
    with pytest.raises(ValueError, match="train_labels must hold at least two classes, got only 3"):
        linear_probe(train, torch.full_like(labels, 3), train, labels)
    with pytest.raises(ValueError, match="labels must be one for each of 20 rows"):
        linear_probe(train, labels, train, labels[:4])
