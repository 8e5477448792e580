"""The correctness check: nothing is timed before the sparse results agree with dense float64.

Truth is the masked dense network in float64. The relative error (2-norm) of each sparse result may
be a multiple of that of plain PyTorch in the same dtype, the worst of the dense variants, plus a
rounding floor. The floor covers another order of summation and a dense error that is small by
chance: a float32 sum over the rows of a map errs like a random walk of half an ulp per row, and a
result in a narrower dtype may be off by an ulp of that dtype besides. The multiple is 4, not the 2
asked of single kernels, because one rounding in an early layer moves all that follows: between two
programs of equal accuracy the ratio scatters (2.3 is the worst seen in 51 random networks, on
images with one visible patch), while a wrong program is off by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .variants import Batch, Variant, make_truth

FACTOR = 4.0


def rounding_floor(rows: int, dtype: torch.dtype) -> float:
    """Relative error that rounding alone may cause in a sum over ``rows`` rows."""
    floor = 0.5 * math.sqrt(rows) * torch.finfo(torch.float32).eps
    return floor if dtype == torch.float32 else floor + torch.finfo(dtype).eps


def step_floor(batch: Batch) -> float:
    """:func:`rounding_floor` of an FCMAE step: of the rows of its widest map.

    At least the pixels of one patch, which the loss sums even where nothing is visible.
    """
    return rounding_floor(max(64 * int((~batch.mask).sum()), 1024), batch.dtype)


class CorrectnessError(RuntimeError):
    """Sparse and dense results disagree, so their times mean nothing."""


@dataclass(frozen=True)
class Comparison:
    """Errors of one result, relative to the norm of the truth."""

    name: str
    sparse_error: float
    dense_error: float
    bound: float

    @property
    def passed(self) -> bool:
        # A NaN error fails: the comparison below is false for it.
        return self.sparse_error <= self.bound

    @property
    def share(self) -> float:
        """Error over bound; with no row at all both are zero."""
        return self.sparse_error / self.bound if self.bound else self.sparse_error


def relative_error(value: Tensor, truth: Tensor) -> float:
    """2-norm of the difference over that of the truth, in float64; absolute for a zero truth."""
    difference = (value.double() - truth).norm().item()
    scale = truth.norm().item()
    return difference / scale if scale else difference


def compare(
    truth: Mapping[str, Tensor], dense: Iterable[Mapping[str, Tensor]], sparse: Mapping[str, Tensor], floor: float
) -> list[Comparison]:
    """Errors and bounds of every named result of ``truth``.

    ``dense`` is gone through once; where it is a generator, one variant's results are alive at a time.
    """
    return _judge(truth, _worst_errors(truth, dense), sparse, floor)


def _worst_errors(truth: Mapping[str, Tensor], dense: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    # Not max(): of a NaN and a number it gives whichever comes first, and a NaN must be seen.
    worst = dict.fromkeys(truth, 0.0)
    for results in dense:
        for name, expected in truth.items():
            error = relative_error(results[name], expected)
            if error > worst[name] or math.isnan(error):
                worst[name] = error
        del results
    return worst


def _judge(
    truth: Mapping[str, Tensor], dense_errors: Mapping[str, float], sparse: Mapping[str, Tensor], floor: float
) -> list[Comparison]:
    return [
        Comparison(
            name, relative_error(sparse[name], expected), dense_errors[name], FACTOR * dense_errors[name] + floor
        )
        for name, expected in truth.items()
    ]


def require(rows: Sequence[Comparison], subject: str) -> dict:
    """Summary of a passed comparison; raises CorrectnessError naming the worst result otherwise."""
    # `not passed` first: a NaN would make any ordering by ratio meaningless.
    worst = max(rows, key=lambda row: (not row.passed, row.share))
    if not worst.passed:
        failed = sum(not row.passed for row in rows)
        raise CorrectnessError(
            f"{subject}: {failed} of {len(rows)} results disagree with masked dense PyTorch in "
            f"float64, first {worst.name}: relative error {worst.sparse_error:.2e}, allowed "
            f"{worst.bound:.2e} (plain PyTorch has {worst.dense_error:.2e})"
        )
    return {
        "results": len(rows),
        "worst": worst.name,
        "sparse_error": worst.sparse_error,
        "dense_error": worst.dense_error,
        "bound": worst.bound,
    }


def results_of(variant: Variant, batch: Batch) -> dict[str, Tensor]:
    """Loss, prediction and the gradient of every parameter."""
    loss, pred = variant.forward(batch)
    loss.backward()
    results = {"loss": loss.detach(), "pred": pred.detach()}
    for name, parameter in variant.model.named_parameters():
        if parameter.grad is None:
            raise CorrectnessError(f"{variant.name!r}: parameter {name} has no gradient")
        results["gradient of " + name] = parameter.grad  # the step below lets go of it
    variant.model.zero_grad(set_to_none=True)
    return results


def check_fcmae(sparse: Variant, dense: Sequence[Variant], batch: Batch, images: int = 2) -> dict:
    """Correctness of the FCMAE step on the first ``images`` images; raises CorrectnessError where it is wrong."""
    return check_variants([sparse], dense, batch, images)[sparse.name]


def check_variants(
    sparse: Sequence[Variant], dense: Sequence[Variant], batch: Batch, images: int = 2
) -> dict[str, dict]:
    """:func:`check_fcmae` of several variants that share their weights, by name; the truth is computed once."""
    few = batch.head(images)
    truth = results_of(make_truth(sparse[0]), few.to_float64())
    dense_errors = _worst_errors(truth, (results_of(variant, few) for variant in dense))
    floor = step_floor(few)
    return {
        variant.name: require(
            _judge(truth, dense_errors, results_of(variant, few), floor), f"FCMAE step, {variant.name}"
        )
        for variant in sparse
    }


def check_loss(name: str, loss: Tensor, expected: Tensor, floor: float) -> None:
    """Raises CorrectnessError unless the loss of a variant on the timed batch is ours, up to rounding."""
    error = relative_error(loss, expected)
    if not error <= floor:
        raise CorrectnessError(
            f"loss of {name!r} differs from the sparse one by {error:.2e} (relative), expected at most {floor:.2e}"
        )
