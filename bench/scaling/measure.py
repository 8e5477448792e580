"""Time and memory of our FCMAE step by batch size, image size and mask ratio, beside the ideal.

Points of one axis are timed in interleaved rounds, so that drift of the machine falls on all of them alike. Memory is
counted (:mod:`.scaling_memory`), and :mod:`.scaling_fit` draws the verdicts.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from convnextv2_kernels.backends import use_backend
from convnextv2_kernels.benchmark import fits, memory
from convnextv2_kernels.benchmark.baseline import PATCH, Variant
from convnextv2_kernels.benchmark.correctness import check_fcmae
from convnextv2_kernels.benchmark.device import available_bytes, dense_at_its_best, free_memory, synchronized
from convnextv2_kernels.benchmark.machine import git_commit
from convnextv2_kernels.benchmark.options import DTYPES, Budget
from convnextv2_kernels.benchmark.peak import arguments_for
from convnextv2_kernels.benchmark.step import check_losses, step_saved_bytes
from convnextv2_kernels.benchmark.timing import summarize, time_interleaved
from convnextv2_kernels.benchmark.variants import (
    MASK_RATIO,
    SPARSE,
    Arm,
    Batch,
    make_batch,
    make_dense,
    make_sparse,
    served_by,
)
from convnextv2_kernels.layout import num_kept
from convnextv2_kernels.models import get_config

from . import fit as scaling_fit
from .memory import names_of_blocks, step_memory

AXES = ("batch_size", "img_size", "mask_ratio")
DENSE = "dense"
DENSE_VARIANT = Variant("channels_last", "conv1x1")
PEAK_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Settings:
    """What is measured at every point; ``batch_size``, ``img_size`` (pixels) and ``mask_ratio`` (share of hidden
    patches) are the values of the axes that do not vary."""

    model: str = "convnextv2_atto"
    batch_size: int = 8
    img_size: int = 224
    mask_ratio: float = MASK_RATIO
    repeats: int = 10
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = "auto"
    dense: bool = True
    peak: bool = False
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


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


def points_of(axis: str, values: Sequence[float], settings: Settings) -> list[Point]:
    """Points of one axis of :data:`AXES`, cheapest first, each once."""
    fixed = Point(settings.batch_size, settings.img_size, settings.mask_ratio)
    points = {fixed._replace(**{axis: value}) for value in values}
    return sorted(points, key=lambda point: (point.patches, point.visible))


def check(settings: Settings) -> dict:
    """Correctness gate at the fixed point; raises GateError when red. Where that point hides nothing or everything, the
    loss is empty, so the gate takes ratio 0.6 of 64 px or more."""
    fixed = Point(settings.batch_size, settings.img_size, settings.mask_ratio)
    if not 0 < fixed.visible < fixed.patches:
        fixed = Point(fixed.batch_size, max(fixed.img_size, 2 * PATCH), MASK_RATIO)
    arms = make_arms(settings)
    return check_fcmae(arms[SPARSE], [arms[DENSE]], _batch(fixed, settings))


def make_arms(settings: Settings) -> dict[str, Arm]:
    """Our arm by the backend asked for, and the dense one, with the same weights."""
    sparse = make_sparse(settings.model, settings.seed, settings.device)
    return {SPARSE: served_by(sparse, settings.backend), DENSE: make_dense(sparse, [DENSE_VARIANT])[0]}


def _batch(point: Point, settings: Settings) -> Batch:
    return make_batch(
        point.batch_size, point.img_size, settings.seed, settings.torch_dtype, settings.device, point.mask_ratio
    )


def measure_axis(
    points: Sequence[Point],
    settings: Settings,
    budget: Budget,
    log: Callable[[str], None],
    advance: Callable[[float], None],
) -> tuple[list[dict], dict[str, str]]:
    """Weigh and time the points of one axis.

    ``advance`` is told the share of the work that has just been done.

    Returns:
        JSON-ready results of the points (``measured``: start of the rounds they share), and for what was left out (a
        point, or the dense arm of one) the reason.

    Raises:
        GateError: a loss of the dense arm is not ours.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    session = {"measured": now, "git": git_commit()}
    arms = make_arms(settings)
    left_out: dict[str, str] = {}
    results: dict[Point, dict] = {}
    steps: dict[tuple[Point, str], Callable[[], None]] = {}
    preparing = budget.part(0.5)
    with dense_at_its_best():
        for point in points:
            advance(0.4 / len(points))
            reason = "no patch is visible" if not point.visible else "time budget" if preparing.spent else None
            if reason:
                left_out[str(point)] = reason
                continue
            log(f"memory of {point}")
            batch = _batch(point, settings)
            chosen = _arms_at(point, arms, settings, left_out)
            try:
                results[point] = {**_weigh(point, chosen, batch, settings), **session}
            except torch.OutOfMemoryError:
                left_out[str(point)] = "out of memory"
                for arm in chosen.values():
                    arm.model.zero_grad(set_to_none=True)
                free_memory(settings.device)
                continue
            for name, arm in chosen.items():
                step = lambda arm=arm, batch=batch: arm.step(batch)  # noqa: E731
                steps[point, name] = synchronized(step, settings.device)
        if steps:
            log(f"timing {len(results)} points, interleaved")
            part = 0.4 / settings.repeats
            samples = time_interleaved(
                steps, settings.repeats, budget.deadline, budget.clock, after_round=lambda: advance(part)
            )
            for (point, name), seconds in samples.items():
                results[point]["arms"][name] |= summarize(seconds)
    # The processes whose peak is measured need the memory.
    steps.clear()
    arms = batch = chosen = None
    free_memory(settings.device)
    for point, result in results.items():
        for name, arm in result["arms"].items():
            spent = settings.peak and budget.spent
            arm["peak"] = {"bytes": None, "reason": "time budget"} if spent else _peak(point, name, settings, log)
    advance(0.2)
    return list(results.values()), left_out


def _arms_at(point: Point, arms: dict[str, Arm], settings: Settings, left_out: dict[str, str]) -> dict[str, Arm]:
    """The arms to measure at a point; the dense one only where it fits the machine's memory."""
    if not settings.dense:
        return {SPARSE: arms[SPARSE]}
    parameters, kept = fits.dense_bytes(settings.model, point.batch_size, point.img_size, DENSE_VARIANT)
    reason = fits.why_not(int(parameters + fits.TEMPORARIES * kept), available_bytes(settings.device))
    if reason:
        left_out[f"{DENSE}, {point}"] = reason
        return {SPARSE: arms[SPARSE]}
    return arms


def _weigh(point: Point, arms: dict[str, Arm], batch: Batch, settings: Settings) -> dict:
    """Everything about a point but its time; leaves the arms warm."""
    config = get_config(settings.model)
    blocks = names_of_blocks(config.depths, len(arms[SPARSE].model.decoder))
    results = {}
    for name, arm in arms.items():
        for _ in range(2):
            arm.step(batch)
        saved = step_saved_bytes(arm, batch)
        free_memory(settings.device)
        used = step_memory(lambda arm=arm: arm.step(batch), blocks, settings.device)
        results[name] = {"saved_bytes": saved, "working_bytes": used["peak_bytes"] - saved, **used}
    if DENSE in arms and point.visible < point.patches:
        # With nothing hidden the dense loss is 0 / 0.
        check_losses([arms[DENSE]], batch, arms[SPARSE].forward(batch)[0].detach().double())
    return {
        **point._asdict(),
        "patches": point.patches,
        "visible_patches": point.visible,
        "pixels": point.patches * scaling_fit.PATCH_PIXELS,
        "visible_pixels": point.visible * scaling_fit.PATCH_PIXELS,
        "flops": scaling_fit.split_flops(batch.mask, config.depths, config.dims),
        "saved_by_encoder_bytes": _saved_by_encoder(arms[SPARSE], batch, settings),
        "arms": results,
    }


def _saved_by_encoder(arm: Arm, batch: Batch, settings: Settings) -> int:
    def encode() -> torch.Tensor:
        with use_backend(settings.backend), torch.autocast(settings.device, batch.dtype, enabled=batch.autocast):
            # A sum saves nothing of its own.
            return arm.model.encode(batch.images, batch.mask)[0].sum()

    alive = [*arm.model.parameters(), *arm.model.buffers(), batch.images, batch.mask]
    saved = memory.saved_bytes(encode, alive)
    arm.model.zero_grad(set_to_none=True)
    return saved


def _peak(point: Point, name: str, settings: Settings, log: Callable[[str], None]) -> dict | None:
    """Peak memory of the step in a process of its own, None where it is not asked for."""
    if not settings.peak:
        return None
    log(f"peak memory of {name}, {point}")
    arguments = arguments_for(
        None if name == SPARSE else DENSE_VARIANT,
        settings.model,
        point.batch_size,
        point.img_size,
        settings.dtype,
        torch.get_num_threads(),
        device=settings.device,
        backend=settings.backend,
        mask_ratio=point.mask_ratio,
    )
    return memory.peak_in_subprocess(arguments, PEAK_TIMEOUT)
