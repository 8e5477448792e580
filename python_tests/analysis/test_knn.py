import math

import numpy as np
import pytest
import torch

from convnextv2_kernels.analysis.knn import knn_classify, knn_votes


def blobs(count, classes=7, width=5, seed=0, spread=0.9):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(123).normal(size=(classes, width))
    labels = rng.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    return centres[labels] + spread * rng.normal(size=(count, width)), labels


def tensors(*pairs):
    return [torch.from_numpy(a.astype(np.float32) if a.ndim == 2 else a) for pair in pairs for a in pair]


def brute_force(train, train_labels, queries, labels, k, temperature):
    """Top-1 and top-5 in percent, one query at a time, in plain float64."""
    hits1 = hits5 = 0
    for query, label in zip(queries.astype(np.float32).astype(float), labels, strict=True):
        similar = []
        for row, other in zip(train.astype(np.float32).astype(float), train_labels, strict=True):
            cosine = float(query @ row) / math.sqrt(float(query @ query) * float(row @ row))
            similar.append((cosine, int(other)))
        votes = {}
        for cosine, other in sorted(similar, reverse=True)[:k]:
            votes[other] = votes.get(other, 0.0) + math.exp(cosine / temperature)
        ranked = sorted(votes, key=votes.get, reverse=True)
        hits1 += ranked[0] == label
        hits5 += int(label) in ranked[:5]
    return 100 * hits1 / len(labels), 100 * hits5 / len(labels)


@pytest.mark.parametrize("k, temperature", [(20, 0.07), (1, 0.07), (5, 1.0), (50, 0.005)])
def test_matches_brute_force(k, temperature):
    train, queries = blobs(120), blobs(60, seed=1)
    result = knn_classify(*tensors(train, queries), k=k, temperature=temperature)
    expected = brute_force(*train, *queries, k, temperature)
    assert (result.top1, result.top5) == pytest.approx(expected, abs=1e-9)
    assert result.images == 60 and result.k == k and result.note is None
    assert 20 < result.top1 < 100  # neither trivial


def test_matches_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, queries = blobs(150), blobs(80, seed=2)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], queries[0])]
    # On the unit sphere squared distance is 2 - 2 cosine, so the same neighbours and exp(cosine / T) follow from it.
    reference = neighbors.KNeighborsClassifier(
        n_neighbors=15, weights=lambda distances: np.exp((1 - distances**2 / 2) / 0.07), algorithm="brute"
    ).fit(unit[0], train[1])
    result = knn_classify(*tensors(train, queries), k=15)
    assert result.top1 == pytest.approx(100 * reference.score(unit[1], queries[1]), abs=1e-9)
    normed = torch.nn.functional.normalize(torch.from_numpy(train[0]).float(), dim=1)
    votes = knn_votes(normed, torch.from_numpy(train[1]), torch.from_numpy(queries[0]), 7, 15, 0.07)
    shares = (votes / votes.sum(1, keepdim=True)).numpy()
    # float32 cosines, wrong by 1e-7, over 0.07
    assert np.allclose(shares, reference.predict_proba(unit[1]), atol=1e-5)


def test_chunks_change_nothing():
    data = tensors(blobs(50), blobs(33, seed=1))
    assert len({knn_classify(*data, chunk=chunk) for chunk in (None, 1, 7, 33, 100)}) == 1


def test_large_and_tiny_temperatures_and_lengths():
    train, labels, queries, wanted = tensors(blobs(50), blobs(20, seed=1))
    first = knn_classify(train, labels, queries, wanted, temperature=1e-4)  # exp(1e4) overflows any float
    assert first == knn_classify(1e3 * train, labels, 1e-3 * queries, wanted, temperature=1e-4)
    nearest = knn_classify(train, labels, queries, wanted, k=1)
    assert first.top1 == nearest.top1


def test_k_is_clipped_with_a_note():
    train, labels, queries, wanted = tensors(blobs(8), blobs(10, seed=1))
    result = knn_classify(train, labels, queries, wanted, k=20)
    assert result.k == 8 and result.note == "k = 20 is more than the 8 training images; k = 8 was used"
    exact = knn_classify(train, labels, queries, wanted, k=8)
    assert exact.note is None and (exact.top1, exact.top5) == (result.top1, result.top5)


def test_a_class_without_votes_is_not_in_the_top_five():
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    result = knn_classify(train, labels, torch.eye(3), torch.tensor([0, 2, 3]), k=1)
    assert result.top1 == result.top5 == pytest.approx(100 / 3)


def test_bad_arguments_are_named():
    train, labels, queries, wanted = tensors(blobs(20), blobs(10, seed=1))
    for options, message in [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"temperature": 0}, "temperature must be greater than 0, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            knn_classify(train, labels, queries, wanted, **options)
    with pytest.raises(ValueError, match="train_labels must be one for each of 20 rows"):
        knn_classify(train, labels[:3], queries, wanted)
    with pytest.raises(ValueError, match="labels must be at least 0, got -1"):
        knn_classify(train, labels, queries, torch.full_like(wanted, -1))
    with pytest.raises(ValueError, match="features must be as wide as train_features, 5, got 4"):
        knn_classify(train, labels, queries[:, :4], wanted)
    with pytest.raises(ValueError, match=r"train_features must be \[N, D\] with N at least 1"):
        knn_classify(train[:0], labels[:0], queries, wanted)
