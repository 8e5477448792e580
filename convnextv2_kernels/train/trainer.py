"""The training loop: exact resume, atomic checkpoints, a clean stop on a signal, on any number of processes.

Steps are counted by the number completed: after step k the weights have been updated k times, the
log has k lines, and checkpoint-k.pt holds all that step k + 1 depends on.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from .._progress import Progress
from ..backends import use_backend
from ..data.images import StepSampler
from ..errors import UserError
from .average import Average
from .board import Board
from .checkpoint import (
    gather_state,
    newest_valid,
    prune_checkpoints,
    remove_temporaries,
    restore_state,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from .config import environment, environment_notes, require_same_config
from .distributed import World, gradient_sync, spread
from .loggers import StepLog
from .nonfinite import first_gradient, first_in_forward
from .optim import lr_at_step, make_optimizer, set_lr
from .signals import StopRequest, ignore_signals
from .task import Span, Task


@dataclass(frozen=True)
class Storage:
    """Where and how often a run is stored; none of it changes a loss.

    ``save_every`` 0 means at the end of an epoch only; ``checkpoints`` False, not at all. ``tensorboard`` writes
    scalars to a folder of that name.
    """

    output: Path
    save_every: int = 0
    keep: int = 3
    checkpoints: bool = True
    tensorboard: bool = False


@dataclass(frozen=True)
class Spread:
    """How a step is split: over ``world``, wrapped as ``parallel`` says, in ``accumulate`` parts one after the other.

    The sum is the same whatever the split, up to the order of its terms.
    """

    world: World = World()  # noqa: RUF009  (immutable)
    parallel: str = "ddp"
    accumulate: int = 1
    workers: int = 0


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
    task: Task,
    storage: Storage,
    split: Spread | None = None,
    max_steps: int | None = None,
    note: Callable[[str], None] = print,
) -> Outcome:
    """Train ``task.model`` until ``task.config`` is fulfilled; say what happened.

    Goes on from the newest sound checkpoint in ``storage.output``, if there is one, with losses
    bitwise equal to those of a run that was never interrupted. ``max_steps`` ends the run early
    without changing the schedule. On SIGINT or SIGTERM the step at hand is finished and saved and
    ``Outcome.stop_signal`` is set. Raises UserError where the settings differ from the
    checkpoint's, a loss or gradient is no finite number, or images or checkpoints cannot be read or written.
    """
    run = Trainer(task, storage, split or Spread(), note)
    total = task.config.total_steps
    stop = total if max_steps is None else min(max_steps, total)
    run.resume()
    if run.outcome.step < stop:
        with ExitStack() as stack:
            run.open_logs(stack)
            stack.enter_context(use_backend(task.config.backend))
            run.advance(stop, stack.enter_context(StopRequest()))
    return run.outcome


class Trainer:
    """One run of a task: its optimiser, its average and its place in the schedule."""

    def __init__(self, task: Task, storage: Storage, split: Spread, note: Callable[[str], None]):
        config, world = task.config, split.world
        parts = world.size * split.accumulate
        if config.batch_size % parts:
            raise UserError(
                f"a batch of {config.batch_size} images cannot be split evenly over {world.size} process(es) times "
                f"{split.accumulate} accumulated part(s); take a --batch-size that is a multiple of {parts}."
            )
        self.task, self.storage, self.split, self.world = task, storage, split, world
        self.note = note if world.is_main else lambda text: None
        self.device = next(task.model.parameters()).device
        self.network = spread(task.model, world, split.parallel, self.device)
        self.optimizer = make_optimizer(task.parameter_groups(), config.lr, config.betas)
        self.average = None if config.ema_decay is None else Average(task.model, config.ema_decay)
        self.outcome = Outcome(step=0, total_steps=config.total_steps)
        self.environment = {**environment(), "processes": world.size, "accumulate": split.accumulate}
        self.share = config.batch_size // world.size

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        if not self.storage.checkpoints:
            return
        state: dict[str, Any] | None = None

        def find() -> dict[str, Any] | None:
            nonlocal state
            remove_temporaries(self.storage.output)
            state, path, warnings = newest_valid(self.storage.output)
            for warning in warnings:
                self.note(f"warning: {warning}")
            if state is None:
                return None
            require_same_config(state["config"], self.task.config, str(path))
            for text in environment_notes(state.get("environment", {}), self.environment):
                self.note(f"note: {text}")
            return {"path": path, **{name: state[name] for name in ("step", "rng", "task")}}

        found = self.world.from_main(find)
        if found is None:
            return
        restore_state(self.task.model, self.optimizer, self.average, state, self.world)
        set_rng_state(found["rng"])
        self.task.restore(found["task"])
        self.outcome.step = found["step"]
        self.outcome.resumed_from = self.outcome.checkpoint = found["path"]

    def open_logs(self, stack: ExitStack) -> None:
        """Open log.jsonl, metrics.jsonl and the scalars of TensorBoard, in the first process."""
        self.log = self.metrics = self.board = None
        output, step = self.storage.output, self.outcome.step

        def enter() -> None:
            self.log = stack.enter_context(closing(StepLog(output / "log.jsonl", step)))
            self.metrics = stack.enter_context(closing(StepLog(output / "metrics.jsonl", step)))
            folder = output / "tensorboard" if self.storage.tensorboard else None
            self.board = stack.enter_context(closing(Board(folder, step)))

        self.world.from_main(enter)

    def advance(self, stop: int, request: StopRequest) -> None:
        """Train up to ``stop`` steps, or until a signal in any process."""
        outcome, config = self.outcome, self.task.config
        self.network.train()
        begun = time.monotonic()
        with Progress("step", stop, outcome.step, quiet=not self.world.is_main) as progress:
            self.progress = progress
            for batch in self._loader(stop):
                lr = lr_at_step(outcome.step, config.total_steps, config.warmup_steps, config.lr, config.min_lr)
                loss, norm = self._step(batch, lr, request)
                outcome.step += 1
                outcome.losses.append(loss)
                outcome.seconds = time.monotonic() - begun
                self._write(loss, lr, norm)
                if outcome.stop_signal is not None and outcome.step == stop:
                    outcome.stop_signal = None  # nothing was cut short
                if outcome.step % config.steps_per_epoch == 0:
                    self.task.epoch_done(self, outcome.step // config.steps_per_epoch - 1)
                    self.network.train()
                if self._save_due(stop) or outcome.stop_signal is not None:
                    self.save()
                if outcome.stop_signal is not None:
                    return

    def save(self) -> None:
        """Write a checkpoint and drop the oldest. All processes must call it."""
        if not self.storage.checkpoints:
            return
        outcome, config = self.outcome, self.task.config
        epoch, position = divmod(outcome.step, config.steps_per_epoch)
        state = gather_state(self.task.model, self.optimizer, self.average)

        def write() -> Path:
            self.log.sync()
            self.metrics.sync()
            extra = {"epoch": epoch, "position": position, "rng": rng_state(), "task": self.task.state()}
            extra.update(config=config.to_dict(), environment=self.environment)
            path = write_checkpoint(self.storage.output, outcome.step, {**state, **extra})
            prune_checkpoints(self.storage.output, outcome.step, self.storage.keep)
            return path

        outcome.checkpoint = self.world.from_main(write)

    def _loader(self, stop: int) -> DataLoader:
        config, begin = self.task.config, self.world.rank * self.share
        part = (begin, begin + self.share)
        sampler = StepSampler(len(self.task.dataset), config.batch_size, config.seed, self.outcome.step, stop, part)
        return DataLoader(
            self.task.dataset,
            batch_sampler=sampler,
            num_workers=self.split.workers,
            collate_fn=self.task.collate,
            worker_init_fn=ignore_signals,
            pin_memory=self.device.type == "cuda",
            # Keeps the loader from drawing its seed from the global stream.
            generator=torch.Generator(),
        )

    def _step(self, batch: Any, lr: float, request: StopRequest) -> tuple[float, float]:
        """Return the loss of the whole batch and the norm of its gradient, after the weights were updated."""
        config, failures = self.task.config, batch.failures
        unreadable = batch.images is None
        if unreadable:  # The other processes wait in this step's exchanges: go through it, then stop all.
            batch = self.task.placeholder(self.share)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        # One wait for the device: losses and norm are read back together.
        *losses, norm = torch.cat([self._gradients(batch), self._gradient_norm()[None]]).tolist()
        told = self.world.gather([request.signum or 0, unreadable, len(failures), *losses])
        if told[:, 2].any():
            self._report_failures(failures)
        if told[:, 1].any():
            self._data_is_gone(failures)
        if not told[:, 3:].isfinite().all() or not math.isfinite(norm):
            self._not_finite(batch, told[:, 3:], lr)
        if signum := int(told[:, 0].max()):
            self.outcome.stop_signal = signum
        if config.clip_grad is not None:
            total = torch.tensor(norm, dtype=config.dtype)
            torch.nn.utils.clip_grads_with_norm_(self.task.model.parameters(), config.clip_grad, total)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.task.model)
        return float(told[:, 3:].flatten().sum()) / told[:, 3:].numel(), norm

    def _gradients(self, batch: Any) -> torch.Tensor:
        """Forward and backward of each part of this process's images; return the losses, float64."""
        losses = []
        for number in range(self.split.accumulate):
            last = number == self.split.accumulate - 1
            with gradient_sync(self.network, last):
                loss = self._loss(batch, number)
                (loss / self.split.accumulate).backward()
            losses.append(loss.detach())
        return torch.stack(losses).double()

    def _loss(self, batch: Any, number: int) -> torch.Tensor:
        size = self.share // self.split.accumulate
        begin = self.world.rank * self.share + number * size
        span = Span(self.outcome.step, begin, begin + size)
        bfloat16 = self.task.config.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return self.task.loss(self.network, batch, number * size, span)

    def _gradient_norm(self) -> torch.Tensor:
        grads = [p.grad for p in self.task.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).double()

    def _not_finite(self, batch: Any, losses: torch.Tensor, lr: float) -> None:
        config, step = self.task.config, self.outcome.step + 1
        bad = losses.isfinite().logical_not().nonzero()
        if len(bad):
            rank, number = bad[0].tolist()
            what = f"the loss is {losses[rank, number].item()}"
            mine = first_in_forward(self.task.model, lambda: self._loss(batch, number))
            found = self.world.gather_objects(mine)[rank]
        else:
            what = "the gradient is not finite"
            found = next(filter(None, self.world.gather_objects(first_gradient(self.task.model))), None)
        where = "no tensor is when the step is run again" if found is None else found
        raise UserError(
            f"step {step} (epoch {self.outcome.step // config.steps_per_epoch + 1}): {what} at learning rate {lr:.3g}; "
            f"stopped before the weights were touched. First tensor that is not finite: {where}. {self._saved_where()} "
            "Try a new --output with a lower --lr, a longer --warmup-epochs"
            + (" or without --amp." if config.precision == "bfloat16" else ".")
        )

    def _data_is_gone(self, failures: list[tuple[str, str]]) -> None:
        if self.outcome.step:
            self.save()
        reasons = dict(f for part in self.world.gather_objects(failures) for f in part)
        name, reason = list(reasons.items())[-1]
        raise UserError(
            f"step {self.outcome.step + 1}: {len(reasons)} images in a row could not be read ({name}: {reason}); "
            f"is the data still there? {self._saved_where()}"
        )

    def _report_failures(self, failures: list[tuple[str, str]]) -> None:
        for name, reason in (f for part in self.world.gather_objects(failures) for f in part):
            if name not in self.outcome.failures:
                self.outcome.failures[name] = reason
                self.progress.note(f"warning: {name} cannot be read any more ({reason}); skipped")

    def _write(self, loss: float, lr: float, norm: float) -> None:
        if not self.world.is_main:
            return
        outcome, config = self.outcome, self.task.config
        epoch = (outcome.step - 1) // config.steps_per_epoch
        rate = self.progress.rate() * config.batch_size
        text = f"epoch {epoch + 1}/{config.epochs}  loss {loss:.4f}  {rate:.1f} images/s"
        self.progress.update(outcome.step, detail=text)
        record = {"step": outcome.step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm}
        self.log.write({**record, "seconds": round(outcome.seconds, 3)})
        self.board.write(outcome.step, {"loss": loss, "lr": lr, "grad_norm": norm, "images_per_second": rate})

    def _save_due(self, stop: int) -> bool:
        step, every = self.outcome.step, self.storage.save_every
        at_end = step == stop or step % self.task.config.steps_per_epoch == 0
        return at_end or (every > 0 and step % every == 0)

    def _saved_where(self) -> str:
        if self.outcome.checkpoint is None:
            return "No checkpoint had been written yet."
        return f"The last checkpoint is {self.outcome.checkpoint}."
