"""The pre-training loop: exact resume, atomic checkpoints, a clean stop on a signal.

Steps are counted by the number completed: after step k the weights have been updated k times, the
log has k lines, and checkpoint-k.pt holds all that step k + 1 depends on.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..backends import use_backend
from ..layout import random_mask
from .checkpoint import (
    newest_valid,
    prune_checkpoints,
    remove_temporaries,
    save_checkpoint,
    set_rng_state,
)
from .config import RunConfig, environment, environment_notes, require_same_config
from .data import Batch, CropDataset, StepSampler, collate, normalize
from .errors import TrainingError
from .journal import StepLog
from .optim import lr_at_step, make_optimizer, set_lr
from .progress import Reporter
from .seeds import MASK, torch_stream
from .stopping import StopRequest, ignore_signals


@dataclass(frozen=True)
class Storage:
    """Where and how often a run is stored; none of it changes a loss.

    ``save_every`` 0 means at the end of an epoch only; ``checkpoints`` False, not at all.
    """

    output: Path
    save_every: int = 0
    keep: int = 3
    checkpoints: bool = True


@dataclass
class Outcome:
    """What a call of :func:`train` did."""

    step: int
    total_steps: int
    resumed_from: Path | None = None
    checkpoint: Path | None = None
    stop_signal: int | None = None
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


def train(
    model: nn.Module,
    dataset: CropDataset,
    config: RunConfig,
    storage: Storage,
    workers: int = 0,
    max_steps: int | None = None,
    note: Callable[[str], None] = print,
) -> Outcome:
    """Train ``model``, an FCMAE, on ``dataset`` until ``config`` is fulfilled; say what happened.

    Goes on from the newest sound checkpoint in ``storage.output``, if there is one, with losses
    bitwise equal to those of a run that was never interrupted. ``max_steps`` ends the run early
    without changing the schedule. On SIGINT or SIGTERM the step at hand is finished and saved and
    ``Outcome.stop_signal`` is set. Raises TrainingError where the settings differ from the
    checkpoint's, the loss is no finite number, or images or checkpoints cannot be read or written.
    """
    run = _Run(model, dataset, config, storage, note)
    stop = config.total_steps if max_steps is None else min(max_steps, config.total_steps)
    run.resume()
    with closing(StepLog(storage.output / "log.jsonl", run.outcome.step)) as log:
        if run.outcome.step < stop:
            with use_backend(config.backend), StopRequest() as request:
                run.advance(stop, workers, log, request)
    return run.outcome


class _Run:
    def __init__(
        self,
        model: nn.Module,
        dataset: CropDataset,
        config: RunConfig,
        storage: Storage,
        note: Callable[[str], None],
    ):
        self.device = torch.device(config.device)
        self.model = model.to(self.device)
        self.dataset, self.config, self.storage, self.note = dataset, config, storage, note
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.outcome = Outcome(step=0, total_steps=config.total_steps)
        self.environment = environment()

    def resume(self) -> None:
        if not self.storage.checkpoints:
            return
        remove_temporaries(self.storage.output)
        state, path, warnings = newest_valid(self.storage.output)
        for warning in warnings:
            self.note(f"warning: {warning}")
        if state is None:
            return
        require_same_config(state["config"], self.config, str(path))
        for text in environment_notes(state.get("environment", {})):
            self.note(f"note: {text}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        self.outcome.step, self.outcome.resumed_from = state["step"], path
        self.outcome.checkpoint = path

    def advance(self, stop: int, workers: int, log: StepLog, request: StopRequest) -> None:
        outcome, config = self.outcome, self.config
        self.model.train()
        loader = self._loader(stop, workers)
        begun = time.monotonic()
        with Reporter("step", stop, outcome.step) as reporter:
            for batch in loader:
                self._report_failures(batch, reporter)
                if batch.images is None:
                    self._save(log)
                    raise TrainingError(
                        f"step {outcome.step + 1}: {len(batch.failures)} images in a row could not "
                        f"be read ({batch.failures[-1][0]}: {batch.failures[-1][1]}); is the data "
                        f"still there? {self._saved_where()}"
                    )
                lr = lr_at_step(outcome.step, config.total_steps, config.warmup_steps, config.lr)
                loss = self._step(batch, lr)
                outcome.step += 1
                outcome.losses.append(loss)
                outcome.seconds = time.monotonic() - begun
                epoch = (outcome.step - 1) // config.steps_per_epoch
                reporter.update(
                    outcome.step,
                    f"epoch {epoch + 1}/{config.epochs}  loss {loss:.4f}  "
                    f"{reporter.rate() * config.batch_size:.1f} images/s",
                )
                record = {"step": outcome.step, "epoch": epoch, "loss": loss, "lr": lr}
                log.write({**record, "seconds": round(outcome.seconds, 3)})
                if request.signum is not None and outcome.step < stop:
                    outcome.stop_signal = request.signum
                if self._save_due(stop) or outcome.stop_signal is not None:
                    self._save(log)
                if outcome.stop_signal is not None:
                    return

    def _loader(self, stop: int, workers: int) -> DataLoader:
        sampler = StepSampler(
            len(self.dataset), self.config.batch_size, self.config.seed, self.outcome.step, stop
        )
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=self.device.type == "cuda",
            # Keeps the loader from drawing its seed from the global stream.
            generator=torch.Generator(),
        )

    def _step(self, batch: Batch, lr: float) -> float:
        config = self.config
        set_lr(self.optimizer, lr)
        images = normalize(batch.images.to(self.device, non_blocking=True))
        mask = draw_mask(config, len(images), self.outcome.step).to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.amp):
            loss, _, _ = self.model(images, mask)
        value = loss.item()
        if not math.isfinite(value):
            step, epoch = self.outcome.step + 1, self.outcome.step // config.steps_per_epoch + 1
            raise TrainingError(
                f"step {step} (epoch {epoch}): the loss is {value} at learning rate "
                f"{lr:.3g}; stopped before the weights were touched. {self._saved_where()} "
                "Try a new --output with a lower --lr, a longer --warmup-epochs"
                + (" or without --amp." if config.amp else ".")
            )
        loss.backward()
        self.optimizer.step()
        return value

    def _save_due(self, stop: int) -> bool:
        step, every = self.outcome.step, self.storage.save_every
        return (
            step == stop
            or step % self.config.steps_per_epoch == 0
            or (every > 0 and step % every == 0)
        )

    def _save(self, log: StepLog) -> None:
        if not self.storage.checkpoints:
            return
        log.sync()
        folder, step = self.storage.output, self.outcome.step
        self.outcome.checkpoint = save_checkpoint(
            folder,
            self.model,
            self.optimizer,
            step,
            self.config.steps_per_epoch,
            self.config.to_dict(),
            self.environment,
        )
        prune_checkpoints(folder, step, self.storage.keep)

    def _saved_where(self) -> str:
        if self.outcome.checkpoint is None:
            return "No checkpoint had been written yet."
        return f"The last checkpoint is {self.outcome.checkpoint}."

    def _report_failures(self, batch: Batch, reporter: Reporter) -> None:
        for name, reason in batch.failures:
            if name not in self.outcome.failures:
                self.outcome.failures[name] = reason
                reporter.note(f"warning: {name} cannot be read any more ({reason}); skipped")


def draw_mask(config: RunConfig, num_images: int, step: int) -> torch.Tensor:
    """Return the mask [N, Gh, Gw] of a 0-based step, True = hidden: a function of (seed, step)."""
    grid = config.grid
    generator = torch_stream(config.seed, MASK, step)
    return random_mask(num_images, grid, ratio=config.mask_ratio, generator=generator)
