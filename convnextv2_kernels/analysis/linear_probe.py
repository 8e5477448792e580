"""Linear probe: a logistic regression on frozen features, by scikit-learn."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import UserError, describe_error
from .knn import check_labelled_features

TOP = 5


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 and top-5 accuracy in percent over ``images``; whether the solver ``converged``, after ``iterations``."""

    top1: float
    top5: float
    images: int
    converged: bool
    iterations: int


def linear_probe(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, C: float = 1.0, max_iter: int = 1000
) -> ProbeResult:
    """Fit a classifier to ``train_features [N, D]`` and test it on ``features [Q, D]``; labels int64 ``[N]``, ``[Q]``.

    Features are standardised by the training set's mean and deviation, then multinomial logistic regression with an
    L2 penalty of inverse strength ``C`` is solved by L-BFGS in float64, in at most ``max_iter`` iterations. A class
    that is not in the training set is never predicted.

    Raises:
        ValueError: empty or mismatched features and labels, fewer than two classes to train on, or ``C`` or
            ``max_iter`` out of range.
        UserError: scikit-learn is not installed.
    """
    check_labelled_features(train_features, train_labels, features, labels)
    if not 0 < C < float("inf"):
        raise ValueError(f"C must be greater than 0, got {C}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if len(train_labels.unique()) < 2:
        raise ValueError(f"train_labels must hold at least two classes, got only {int(train_labels[0])}")
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise UserError(
            f"the linear probe needs scikit-learn, which cannot be imported ({describe_error(error)}); "
            "install it with pip install scikit-learn."
        ) from error
    solver = LogisticRegression(C=C, max_iter=max_iter)
    pipeline = make_pipeline(StandardScaler(), solver)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline.fit(_float64(train_features), train_labels.cpu().numpy())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    scores = pipeline.decision_function(_float64(features))
    if scores.ndim == 1:  # two classes have one score, that of the second
        scores = np.stack([-scores, scores], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    hits = solver.classes_[order] == labels.cpu().numpy()[:, None]
    top1, top5 = 100 * hits[:, 0].mean(), 100 * hits.any(axis=1).mean()
    return ProbeResult(float(top1), float(top5), len(hits), converged, int(solver.n_iter_.max()))


def _float64(features: Tensor) -> np.ndarray:
    return features.detach().cpu().double().numpy()
