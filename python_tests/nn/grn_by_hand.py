"""GRN's ablations in float64 numpy, by a loop over images and channels: nothing from the package is used."""

import itertools
import math

import numpy as np
import torch

FORMULAS = list(itertools.product(("l2", "l1", "mean"), ("divisive", "standardize", "inverse"), (True, False)))
# Table 16 a to c, and one of the parts without skip
FORMULAS += [("none", "none", True), ("l2", "none", True), ("none", "divisive", True), ("l1", "none", False)]
EPS = 1e-6


def variant_text(formula):
    aggregation, normalizer, skip = formula
    words = (
        {"none": "normalize-only"}.get(aggregation, aggregation),
        {"none": "aggregate-only"}.get(normalizer, normalizer),
    )
    words = ("affine",) if (aggregation, normalizer) == ("none", "none") else words
    return ",".join((*words, "skip" if skip else "no-skip"))


def owners(x, mask, scope):
    """Image of each row of the packed (or, without a mask, dense) array ``[P or N, h, w, C]``."""
    if scope == "batch":
        return np.zeros(len(x), dtype=int)
    if mask is None:
        return np.arange(len(x))
    return np.repeat(np.arange(len(mask)), [(~m).sum() for m in mask.numpy()])


def response(rows, aggregation, normalizer):
    """``N(G)`` of one image's visible rows ``[M, C]``; without an aggregation ``[M, C]``, of each row."""
    if aggregation == "none":
        return np.array([np.ones_like(row) if normalizer == "none" else row / (row.mean() + EPS) for row in rows])
    g = []
    for values in rows.T:
        if aggregation == "l2":
            g.append(math.sqrt(math.fsum(v * v for v in values)))
        elif aggregation == "l1":
            g.append(math.fsum(abs(v) for v in values))
        else:
            g.append(math.fsum(values) / len(values))
    if normalizer == "none":
        return np.array(g)
    mean = math.fsum(g) / len(g)
    if normalizer == "divisive":
        return np.array([v / (mean + EPS) for v in g])
    if normalizer == "inverse":
        return np.array([1 / (mean + EPS) for _ in g])
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in g) / len(g))
    return np.array([(v - mean) / (deviation + EPS) for v in g])


def grn(x, gamma, beta, mask, scope, formula):
    aggregation, normalizer, skip = formula
    out, owner = np.zeros_like(x), owners(x, mask, scope)
    for image in set(owner.tolist()):
        here = x[owner == image]
        scale = response(here.reshape(-1, x.shape[-1]), aggregation, normalizer)
        scaled = here * (scale.reshape(here.shape) if scale.ndim == 2 else scale)
        out[owner == image] = gamma * scaled + beta + (here if skip else 0)
    return out


def ragged_mask():
    """An image with one visible patch, one with none, one with all, one with three; on a grid that is no square."""
    mask = torch.ones(4, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[2] = False
    mask[3, 0, 0] = mask[3, 0, 1] = mask[3, 1, 2] = False
    return mask
