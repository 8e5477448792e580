"""What a step should cost by the work it is given, and what the measured costs say: line, exponent, verdict.

FCMAE's encoder works on visible patches, its decoder on every patch, and a prediction passes a gradient back for hidden
patches only. So the ideal cost of a step is ``V * visible + A * patches + H * hidden``, with the three weights counted
at the largest point and scaled to what was measured there. Over batch and image size that is proportional to pixels;
over the mask ratio it is a line whose height at no visible patch is the decoder's share. What is fixed, such as the
gradients of parameters, or goes by images, such as one norm for each hidden channel that is saved, shows as a distance
from the ideal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from convnextv2_kernels.benchmark import counts
from convnextv2_kernels.benchmark.baseline import PATCH
from convnextv2_kernels.benchmark.variants import SPARSE

from .memory import chunk_verdict

PATCH_PIXELS = PATCH * PATCH
LEAST_POINTS = 3


def split_flops(
    mask: Tensor,
    depths: Sequence[int],
    dims: Sequence[int],
    in_chans: int = 3,
    decoder_width: int = 512,
    decoder_depth: int = 1,
) -> dict[str, float]:
    """Flops of :func:`.counts.fcmae_step`, by the patches that cause them; mask [N, Gh, Gw] bool, True = hidden.

    ``visible``: encoder and projection. ``every``: decoder and the forward pass of the prediction. ``hidden``: backward
    of the prediction.
    """
    patches, hidden = mask.numel(), int(mask.sum())
    sites = patches - hidden
    visible = counts.matrix_product(sites * 64, 16 * in_chans, dims[0], input_grad=False).flops
    for stage, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        side = 8 >> stage
        rows = sites * side * side
        if stage:
            visible += counts.downsample(rows * 4, dims[stage - 1], width).flops
        visible += depth * counts.block(rows, counts.visible_taps(mask, side), width).flops
    visible += counts.matrix_product(sites, dims[-1], decoder_width).flops
    taps = counts.visible_taps(torch.zeros_like(mask), 1)
    prediction = 2 * decoder_width * PATCH_PIXELS * in_chans
    return {
        "visible": visible,
        "every": decoder_depth * counts.block(patches, taps, decoder_width).flops + prediction * patches,
        "hidden": 2.0 * prediction * hidden,
    }


@dataclass(frozen=True)
class Weights:
    """Cost of one visible patch, of any patch and of one hidden patch, in any unit."""

    visible: float
    every: float
    hidden: float

    def cost(self, visible: int, patches: int) -> float:
        """Cost of a batch with this many visible patches among all its patches."""
        return self.visible * visible + self.every * patches + self.hidden * (patches - visible)


def flop_weights(flops: dict[str, float], visible: int, patches: int) -> Weights:
    """Weights in flops, from :func:`split_flops` at one point with ``visible`` > 0."""
    one_hidden = torch.ones(1, 1, 1, dtype=torch.bool)
    hidden = split_flops(one_hidden, (0,) * 4, (1,) * 4)["hidden"]
    return Weights(flops["visible"] / visible, flops["every"] / patches, hidden)


def byte_weights(saved: int, saved_by_encoder: int, visible: int, patches: int, itemsize: int) -> Weights:
    """Weights in bytes saved for backward, from one point; a hidden patch keeps its error, 32 x 32 x 3 values."""
    hidden = 3 * PATCH_PIXELS * itemsize
    rest = saved - saved_by_encoder - hidden * (patches - visible)
    return Weights(saved_by_encoder / visible, rest / patches, hidden)


@dataclass(frozen=True)
class Fit:
    """The line ``intercept + slope * x`` and a verdict.

    ``linear``: True where every point lies within ``tolerance`` of the line, relative to it; False where the quartiles
    of some point lie outside as a whole; None where medians stray but noise may be why. ``exponent`` is the slope of
    log y over log x, which a fixed cost bends below 1; ``ideal_exponent`` that of the ideal at the same points.
    """

    slope: float
    intercept: float
    r2: float
    exponent: float
    ideal_exponent: float
    linear: bool | None
    tolerance: float
    worst_deviation: float
    worst_x: float
    most_over_ideal: float


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """(slope, intercept, R^2) by least squares of relative errors: noise grows with y, and the verdict is relative."""
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    x_mean = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y_mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    xx = sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    xy = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True))
    yy = sum(w * (y - y_mean) ** 2 for w, y in zip(weights, ys, strict=True))
    slope = xy / xx
    # Equal y: the line is exact.
    return slope, y_mean - slope * x_mean, xy**2 / (xx * yy) if yy else 1.0


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of log y over log x by least squares."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    x_mean, y_mean = sum(lx) / len(lx), sum(ly) / len(ly)
    xy = sum((x - x_mean) * (y - y_mean) for x, y in zip(lx, ly, strict=True))
    return xy / sum((x - x_mean) ** 2 for x in lx)


def fit(
    xs: Sequence[float],
    ys: Sequence[float],
    ideal: Sequence[float],
    tolerance: float,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> dict | None:
    """:class:`Fit` of positive costs ``ys`` (medians) over positive ``xs``, as a dict; quartiles ``low``, ``high``
    default to the costs themselves. None with fewer than three different ``xs``: any two points are linear."""
    if len(set(xs)) < LEAST_POINTS:
        return None
    low, high = low or ys, high or ys
    slope, intercept, r2 = line(xs, ys)
    linear: bool | None = True
    worst, worst_x = 0.0, xs[0]
    for x, y, y_low, y_high in zip(xs, ys, low, high, strict=True):
        on_line = intercept + slope * x
        allowed = tolerance * abs(on_line)
        deviation = (y - on_line) / abs(on_line) if on_line else math.copysign(math.inf, y)
        if abs(deviation) > abs(worst):
            worst, worst_x = deviation, x
        if abs(y - on_line) > allowed:
            outside = y_low > on_line + allowed or y_high < on_line - allowed
            linear = False if outside or linear is False else None
    return asdict(
        Fit(
            slope,
            intercept,
            r2,
            exponent(xs, ys),
            exponent(xs, ideal),
            linear,
            tolerance,
            worst,
            worst_x,
            max(y / i for y, i in zip(ys, ideal, strict=True)),
        )
    )


def series_of(
    axis: str, points: Sequence[dict], left_out: dict[str, str], itemsize: int, save: str, tolerance: float
) -> dict:
    """Points of one axis in order, each with its ideal, and what they say.

    Args:
        points: as :func:`.measure.measure_axis` gives them.
        left_out: reasons by name, passed on.
        itemsize: bytes of a value in matrix products, as autocast keeps the error of the prediction.
        save: the policy of ``schedule.save_policy``.
        tolerance: share by which a linear cost may stray from its line.

    Returns:
        JSON-ready. ``fit``: of time (ms) and saved bytes over visible pixels, see :class:`Fit`; on the batch axis
        ``hidden_chunk``, see :func:`.memory.chunk_verdict`.
    """
    points = sorted(points, key=lambda point: (point["patches"], point["visible_patches"]))
    series: dict = {"axis": axis, "points": points, "fit": {}, "left_out": left_out}
    # Points of different sessions were not interleaved: drift between them is in the fit.
    series["sessions"] = sorted({point["measured"] for point in points})
    if not points:
        return series
    reference = max(points, key=lambda point: (point["visible_patches"], point["patches"]))
    visible, patches = reference["visible_patches"], reference["patches"]
    ours = [point["variants"][SPARSE] for point in points]
    measured = reference["variants"][SPARSE]
    saved = measured["saved_bytes"], reference["saved_by_encoder_bytes"]
    weights = {
        "median_ms": flop_weights(reference["flops"], visible, patches),
        "saved_bytes": byte_weights(*saved, visible, patches, itemsize),
    }
    for point in points:
        point["ideal"] = {
            name: measured[name] * w.cost(point["visible_patches"], point["patches"]) / w.cost(visible, patches)
            for name, w in weights.items()
        }
    xs = [point["visible_pixels"] for point in points]
    quartiles = [[row[name] for row in ours] for name in ("q1_ms", "q3_ms")]
    for name in weights:
        ys, ideal = [row[name] for row in ours], [point["ideal"][name] for point in points]
        series["fit"][name] = fit(xs, ys, ideal, tolerance, *(quartiles if name == "median_ms" else ()))
    if axis == "batch_size":
        hidden = [(point["batch_size"], row["hidden"]) for point, row in zip(points, ours, strict=True)]
        series["hidden_chunk"] = chunk_verdict(hidden, save)
    return series
