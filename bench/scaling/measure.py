"""Time and memory of our FCMAE step by batch size, image size and mask ratio, beside the ideal.

Points of one axis are timed in interleaved rounds, so that drift of the machine falls on all of them alike. Memory is
counted (:mod:`.memory`), and :mod:`.fit` draws the verdicts.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from convnextv2_kernels.backends import use_backend
from convnextv2_kernels.benchmark import memory
from convnextv2_kernels.benchmark.baseline import PATCH, Baseline
from convnextv2_kernels.benchmark.correctness import check_fcmae, check_loss, step_floor
from convnextv2_kernels.benchmark.machine import (
    OUT_OF_MEMORY,
    available_bytes,
    dense_at_its_best,
    free_memory,
    git_commit,
    out_of_memory,
    synchronized,
)
from convnextv2_kernels.benchmark.step import OUT_OF_TIME, peak_of_process, saved_bytes
from convnextv2_kernels.benchmark.timing import Budget, Control, summarize, time_interleaved
from convnextv2_kernels.benchmark.variants import (
    MASK_RATIO,
    SPARSE,
    Batch,
    Settings,
    Variant,
    make_dense,
    make_sparse,
    run_by,
)
from convnextv2_kernels.layout import num_kept
from convnextv2_kernels.models import get_config

from . import fit as scaling_fit
from .memory import names_of_blocks, step_memory

AXES = ("batch_size", "img_size", "mask_ratio")
DENSE = "dense"
COPY = "copy"  # the control
DENSE_BASELINE = Baseline("channels_last", "conv1x1")


@dataclass(frozen=True)
class ScalingSettings(Settings):
    """What is measured at every point; ``batch_size``, ``img_size`` (pixels) and ``mask_ratio`` (share of hidden
    patches) are the values of the axes that do not vary."""

    model: str = "convnextv2_atto"
    backend: str = "auto"
    dense: bool = True
    peak: bool = False


class Point(NamedTuple):
    """Where the step is measured."""

    batch_size: int
    img_size: int
    mask_ratio: float

    @property
    def grid(self) -> tuple[int, int]:
        return (self.img_size // PATCH,) * 2

    @property
    def patches(self) -> int:
        return self.batch_size * self.grid[0] * self.grid[1]

    @property
    def visible(self) -> int:
        return self.batch_size * num_kept(self.grid, self.mask_ratio)

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.img_size} px, mask ratio {self.mask_ratio:g}"


def points_of(axis: str, values: Sequence[float], settings: ScalingSettings) -> list[Point]:
    """Points of one axis of :data:`AXES`, cheapest first, each once."""
    fixed = Point(settings.batch_size, settings.img_size, settings.mask_ratio)
    points = {fixed._replace(**{axis: value}) for value in values}
    return sorted(points, key=lambda point: (point.patches, point.visible))


def check(settings: ScalingSettings) -> dict:
    """Correctness at the fixed point; raises CorrectnessError where it is wrong. Where that point hides nothing or
    everything, the loss is empty, so the check takes ratio 0.6 of 64 px or more."""
    fixed = Point(settings.batch_size, settings.img_size, settings.mask_ratio)
    if not 0 < fixed.visible < fixed.patches:
        fixed = Point(fixed.batch_size, max(fixed.img_size, 2 * PATCH), MASK_RATIO)
    variants = make_variants(settings)
    return check_fcmae(variants[SPARSE], [variants[DENSE]], settings.make_batch(**fixed._asdict()))


def make_variants(settings: ScalingSettings) -> dict[str, Variant]:
    """Ours by the backend asked for, and the dense one, with the same weights."""
    sparse = make_sparse(settings.model, settings.seed, settings.device)
    return {SPARSE: run_by(sparse, settings.backend), DENSE: make_dense(sparse, [DENSE_BASELINE])[0]}


def measure_axis(
    points: Sequence[Point],
    settings: ScalingSettings,
    budget: Budget,
    log: Callable[[str], None],
    advance: Callable[[float], None],
) -> tuple[list[dict], dict[str, str], dict | None]:
    """Weigh and time the points of one axis.

    ``advance`` is told the share of the work that has just been done.

    Returns:
        JSON-ready results of the points (``measured``: start of the rounds they share); for what was left out (a
        point, or the dense variant of one) the reason; and the control, of the last point: the dense variant against a
        copy of itself, or ours where no dense one was timed.

    Raises:
        CorrectnessError: a loss of the dense variant is not ours.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    session = {"measured": now, "git": git_commit()}
    variants = make_variants(settings)
    left_out: dict[str, str] = {}
    results: dict[Point, dict] = {}
    steps: dict[tuple[Point, str], Callable[[], None]] = {}
    control: tuple[Point, str] | None = None
    preparing = budget.part(0.5)
    with dense_at_its_best():
        for point in points:
            advance(0.4 / len(points))
            reason = "no patch is visible" if not point.visible else OUT_OF_TIME if preparing.spent else None
            if reason:
                left_out[str(point)] = reason
                continue
            log(f"memory of {point}")
            batch = settings.make_batch(**point._asdict())
            chosen = _variants_at(point, variants, settings, left_out)
            found = _weighed(point, chosen, batch, settings)
            if found is None:
                left_out[str(point)] = OUT_OF_MEMORY
                continue
            results[point] = {**found, **session}
            for name, variant in chosen.items():
                steps[point, name] = _step(variant, batch)
            control = point, name
            copy, copied_batch = variant, batch
        if control is not None:
            steps[control[0], COPY] = _step(copy.copy(), copied_batch)
            for _ in range(2):
                steps[control[0], COPY]()
            log(f"timing {len(results)} points, interleaved")
            part = 0.4 / settings.repeats
            samples = time_interleaved(
                steps, settings.repeats, budget.deadline, budget.clock, after_round=lambda: advance(part)
            )
            told = Control.from_samples(
                f"{control[1]}, {control[0]}", samples[control], samples.pop((control[0], COPY))
            )
            for (point, name), seconds in samples.items():
                results[point]["variants"][name] |= summarize(seconds)
    # The processes whose peak is measured need the memory.
    steps.clear()
    batch = chosen = copy = copied_batch = variant = None
    free_memory(settings.device)
    for point, result in results.items():
        for name, row in result["variants"].items():
            spent = settings.peak and budget.spent
            row["peak"] = (
                {"bytes": None, "reason": OUT_OF_TIME} if spent else _peak(point, variants[name], settings, log)
            )
    advance(0.2)
    return list(results.values()), left_out, None if control is None else told.to_json()


def _step(variant: Variant, batch: Batch) -> Callable[[], None]:
    return synchronized(lambda: variant.step(batch), batch.device)


def _variants_at(
    point: Point, variants: dict[str, Variant], settings: ScalingSettings, left_out: dict[str, str]
) -> dict[str, Variant]:
    """The variants to measure at a point; the dense one only where it fits the machine's memory."""
    if not settings.dense:
        return {SPARSE: variants[SPARSE]}
    parameters, kept = memory.dense_bytes(settings.model, point.batch_size, point.img_size, DENSE_BASELINE)
    reason = memory.shortage(int(parameters + memory.TEMPORARIES * kept), available_bytes(settings.device))
    if reason:
        left_out[f"{DENSE}, {point}"] = reason
        return {SPARSE: variants[SPARSE]}
    return variants


def _weighed(point: Point, variants: dict[str, Variant], batch: Batch, settings: ScalingSettings) -> dict | None:
    """:func:`_weigh`, None where memory runs out."""
    try:
        return _weigh(point, variants, batch, settings)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    for variant in variants.values():
        variant.model.zero_grad(set_to_none=True)
    free_memory(settings.device)
    return None


def _weigh(point: Point, variants: dict[str, Variant], batch: Batch, settings: ScalingSettings) -> dict:
    """Everything about a point but its time; leaves the variants warm."""
    config = get_config(settings.model)
    blocks = names_of_blocks(config.depths, len(variants[SPARSE].model.decoder))
    results = {}
    for name, variant in variants.items():
        for _ in range(2):
            variant.step(batch)
        saved = saved_bytes(variant, batch)
        free_memory(settings.device)
        used = step_memory(lambda variant=variant: variant.step(batch), blocks, settings.device)
        results[name] = {
            **variant.described(),
            "saved_bytes": saved,
            "working_bytes": used["peak_bytes"] - saved,
            **used,
        }
    if DENSE in variants and point.visible < point.patches:
        # With nothing hidden the dense loss is 0 / 0.
        ours, theirs = (variants[name].forward(batch)[0].detach() for name in (SPARSE, DENSE))
        check_loss(DENSE, theirs, ours.double(), step_floor(batch))
    return {
        **point._asdict(),
        "patches": point.patches,
        "visible_patches": point.visible,
        "pixels": point.patches * scaling_fit.PATCH_PIXELS,
        "visible_pixels": point.visible * scaling_fit.PATCH_PIXELS,
        "flops": scaling_fit.split_flops(batch.mask, config.depths, config.dims),
        "saved_by_encoder_bytes": _saved_by_encoder(variants[SPARSE], batch, settings),
        "variants": results,
    }


def _saved_by_encoder(variant: Variant, batch: Batch, settings: ScalingSettings) -> int:
    def encode() -> torch.Tensor:
        with use_backend(settings.backend), torch.autocast(settings.device, batch.dtype, enabled=batch.autocast):
            # A sum saves nothing of its own.
            return variant.model.encode(batch.images, batch.mask)[0].sum()

    alive = [*variant.model.parameters(), *variant.model.buffers(), batch.images, batch.mask]
    saved = memory.saved_bytes(encode, alive)
    variant.model.zero_grad(set_to_none=True)
    return saved


def _peak(point: Point, variant: Variant, settings: ScalingSettings, log: Callable[[str], None]) -> dict | None:
    """Peak memory of the step in a process of its own, None where it is not asked for."""
    if not settings.peak:
        return None
    log(f"peak memory of {variant.name}, {point}")
    return peak_of_process(variant, settings.model, replace(settings, **point._asdict()))
