"""The FCMAE training step: sparse against every masked dense variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .. import backends
from . import counts, memory
from .baseline import Variant, eager_variants, encoder_sizes
from .correctness import GateError, check_fcmae, relative_error, step_floor
from .device import OUT_OF_MEMORY, free_memory, out_of_memory, synchronized
from .options import Budget, Options
from .peak import arguments_for
from .timing import summarize, time_interleaved
from .variants import SPARSE, Arm, Batch, make_batch, make_dense, make_sparse

WARMUP_STEPS = 2
PEAK_TIMEOUT = 600.0


def _loss(arm: Arm, batch: Batch) -> torch.Tensor:
    return arm.forward(batch)[0]


def step_saved_bytes(arm: Arm, batch: Batch) -> int:
    """Bytes saved for backward by an arm's step."""
    alive = [*arm.model.parameters(), *arm.model.buffers(), batch.images, batch.mask]
    total = memory.saved_bytes(lambda: _loss(arm, batch), alive)
    arm.model.zero_grad(set_to_none=True)
    return total


def check_losses(arms: Sequence[Arm], batch: Batch, sparse_loss: torch.Tensor) -> None:
    """The losses of the timed batch agree, compiled variants included; raises GateError otherwise."""
    floor = step_floor(batch)
    for arm in arms:
        error = relative_error(_loss(arm, batch).detach(), sparse_loss)
        if not error <= floor:
            raise GateError(
                f"loss of {arm.name!r} differs from the sparse one by {error:.2e} (relative), "
                f"expected at most {floor:.2e}"
            )


def compiled_arms(
    sparse: Arm, variants: Sequence[Variant], batch: Batch, budget: Budget, log: Callable[[str], None]
) -> tuple[list[Arm], dict[str, str]]:
    """Compiled and warm variants, and why others were skipped: half of the budget spent, out of memory, or the compiler
    failed."""
    # The variants are instances of one class, each a recompilation to the compiler; a fresh start
    # for each model keeps their number within its limit.
    torch._dynamo.reset()
    arms, skipped = [], {}
    compiling = budget.part(0.5)
    for variant in variants:
        if compiling.spent:
            skipped[variant.name] = "time budget"
            continue
        log(f"compiling {variant.name}")
        arm = make_dense(sparse, [variant])[0]
        try:
            arm.step(batch)
        except Exception as error:  # of the compiler, in classes that differ between versions of PyTorch
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            skipped[variant.name] = OUT_OF_MEMORY if out_of_memory(error) else f"cannot be compiled: {first}"
        if variant.name not in skipped:
            arms.append(arm)
            continue
        arm.model.zero_grad(set_to_none=True)
        free_memory(batch.images.device.type)
    return arms, skipped


def measure_step(model_name: str, options: Options, budget: Budget, log: Callable[[str], None]) -> dict:
    """Check, then time and weigh the training step of one model.

    Returns JSON-ready results. Raises GateError, before anything is timed, when the arms disagree.
    """
    shape = (options.batch_size, options.img_size, options.seed, options.torch_dtype)
    batch = make_batch(*shape, options.device)
    sparse = make_sparse(model_name, options.seed, options.device)
    eager = make_dense(sparse, eager_variants())
    log(f"{model_name}: comparing losses and gradients with float64")
    gate = check_fcmae(sparse, eager, batch)
    compiled, skipped = [], {}
    if options.compile:
        tuned = [replace(variant, compiled=True) for variant in eager_variants()]
        compiled, skipped = compiled_arms(sparse, tuned, batch, budget, log)
    arms = [sparse, *eager, *compiled]
    check_losses(arms[1:], batch, _loss(sparse, batch).detach().double())

    log(f"{model_name}: bytes saved for backward")
    saved = {arm.name: step_saved_bytes(arm, batch) for arm in arms}
    log(f"{model_name}: timing {len(arms)} arms, interleaved")
    samples = time_arms(arms, batch, options.repeats, budget)
    results = {arm.name: {**summarize(samples[arm.name]), "saved_bytes": saved[arm.name], "peak": None} for arm in arms}
    for group in ([sparse], eager, compiled):
        if group and not budget.spent:
            fastest = min(group, key=lambda arm: results[arm.name]["median_ms"])
            log(f"{model_name}: peak memory of {fastest.name}")
            results[fastest.name]["peak"] = _peak(fastest, model_name, options)
    return {
        "model": model_name,
        "gate": gate,
        "arms": results,
        "skipped": skipped,
        "flops": flops_of(sparse, batch),
        **ratios(results),
    }


def time_arms(
    arms: Sequence[Arm],
    batch: Batch,
    repeats: int,
    budget: Budget,
    warmup: int = WARMUP_STEPS,
    after_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each step by arm, warm, in interleaved rounds."""
    for arm in arms:
        for _ in range(warmup):
            arm.step(batch)
    device = batch.images.device.type
    steps = {arm.name: synchronized(lambda arm=arm: arm.step(batch), device) for arm in arms}
    return time_interleaved(steps, repeats, budget.deadline, budget.clock, after_round)


def _peak(arm: Arm, model_name: str, options: Options) -> dict:
    arguments = arguments_for(
        arm.variant,
        model_name,
        options.batch_size,
        options.img_size,
        options.dtype,
        torch.get_num_threads(),
        device=options.device,
        backend=backends.forced(),
    )
    return memory.peak_in_subprocess(arguments, PEAK_TIMEOUT)


def flops_of(sparse: Arm, batch: Batch) -> dict[str, float]:
    """Counted minimum of a step over visible sites, and over all sites."""
    depths, dims = encoder_sizes(sparse.model.state_dict())
    return {
        "sparse": counts.fcmae_step(batch.mask, depths, dims),
        "dense": counts.fcmae_step(batch.mask, depths, dims, dense=True),
    }


def ratios(arms: dict[str, dict]) -> dict:
    """The fastest dense arm and the most frugal one, each against the sparse arm."""
    dense = {name: arm for name, arm in arms.items() if name != SPARSE}
    fastest = min(dense, key=lambda name: dense[name]["median_ms"])
    frugal = min(dense, key=lambda name: dense[name]["saved_bytes"])
    sparse = arms[SPARSE]
    return {
        "fastest_dense": fastest,
        "time_ratio": dense[fastest]["median_ms"] / sparse["median_ms"],
        "frugal_dense": frugal,
        "saved_ratio": dense[frugal]["saved_bytes"] / sparse["saved_bytes"],
    }


def compare_fcmae_step(model_name: str, batch_size: int, img_size: int = 224, repeats: int = 3) -> dict:
    """A quick comparison of one FCMAE training step in float32, without compiled variants.

    Args:
        model_name: such as ``convnextv2_atto``.
        batch_size: images per step.
        img_size: side of the images in pixels, a multiple of 32.
        repeats: timed rounds; each runs the sparse step and four dense variants once.

    Returns:
        ``sparse_ms``, ``dense_ms``: medians, of the fastest dense variant, ``dense_variant``;
        ``time_ratio``, dense over sparse; ``sparse_bytes``, ``dense_bytes``: saved for backward, of
        the same dense variant; ``bytes_ratio``.

    Raises:
        GateError: the sparse loss or a gradient disagrees with float64.
    """
    batch = make_batch(batch_size, img_size, seed=0)
    sparse = make_sparse(model_name, seed=0)
    tuned = [variant for variant in eager_variants() if variant.pointwise != "plain"]
    arms = [sparse, *make_dense(sparse, tuned)]
    check_fcmae(sparse, arms[1:], batch, images=1)
    samples = time_arms(arms, batch, repeats, Budget(None))
    medians = {name: summarize(seconds)["median_ms"] for name, seconds in samples.items()}
    best = min(arms[1:], key=lambda arm: medians[arm.name])
    sparse_bytes, dense_bytes = step_saved_bytes(sparse, batch), step_saved_bytes(best, batch)
    return {
        "sparse_ms": medians[SPARSE],
        "dense_ms": medians[best.name],
        "dense_variant": best.name.removeprefix("dense "),
        "time_ratio": medians[best.name] / medians[SPARSE],
        "sparse_bytes": sparse_bytes,
        "dense_bytes": dense_bytes,
        "bytes_ratio": dense_bytes / sparse_bytes,
    }
