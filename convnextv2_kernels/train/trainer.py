"""The training loop and the tasks it trains: exact resume, atomic checkpoints, a clean stop on a signal, on any number
of processes.

Steps are counted by the number completed: after step k the weights have been updated k times, the
log has k lines, and checkpoint-k.pt holds all that step k + 1 depends on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .._progress import Progress
from ..backends import use_backend
from ..data.images import StepSampler
from ..errors import UserError, describe_os_error
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
from .config import RunConfig, environment, environment_notes, require_same_config
from .distributed import World, gradient_sync, spread
from .loggers import Board, StepLog
from .nonfinite import first_gradient, first_in_forward
from .optim import Average, lr_at_step, make_optimizer, set_lr
from .signals import StopRequest, ignore_signals


class Span(NamedTuple):
    """Images ``begin`` to ``end`` of the batch of 0-based ``step``, as all processes together see it."""

    step: int
    begin: int
    end: int


class Task(Protocol):
    """A model, its data and its loss. The loop knows nothing else of what is trained.

    ``dataset`` is addressed by (epoch, index); ``collate`` makes of its samples a batch with ``images`` (None where
    they could not be read) and ``failures``. Everything random is a function of the seed and a :class:`Span`, never of
    how the batch is split.
    """

    @property
    def config(self) -> RunConfig:
        """The settings of the run."""

    @property
    def model(self) -> nn.Module:
        """The model, on its device."""

    @property
    def dataset(self) -> Dataset:
        """See above."""

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """See above."""

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimiser, with their weight decay."""

    def placeholder(self, count: int) -> Any:
        """A batch of ``count`` blank images, in place of images that could not be read."""

    def loss(self, network: nn.Module, batch: Any, first: int, span: Span) -> Tensor:
        """Mean loss of the images ``span`` of a step, which are ``batch``'s from ``first`` on. ``network`` is the model
        as it is spread over processes."""

    def epoch_done(self, trainer: Trainer, epoch: int) -> None:
        """Called in all processes after the last step of a 0-based epoch, before its checkpoint."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember of the task."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` returned."""


@dataclass(frozen=True)
class Storage:
    """Where and how often a run is stored; none of it changes a loss.

    ``save_every`` 0 means at the end of an epoch only; ``checkpoints`` False, not at all. Only the last
    ``max_checkpoints`` stay on disk. ``tensorboard`` writes
    scalars to a folder of that name.
    """

    output: Path
    save_every: int = 0
    max_checkpoints: int = 3
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


class StepStatus(NamedTuple):
    """What each process reports of a step, float64, in the order of ranks: the same in all processes.

    ``signum [size]``: of a signal to stop, 0 without. ``unreadable [size]``: 1 where there were no images.
    ``failures [size]``: files that could not be read. ``losses [size, accumulate]``: of each part of the images.
    """

    signum: Tensor
    unreadable: Tensor
    failures: Tensor
    losses: Tensor

    @classmethod
    def gather(
        cls, world: World, signum: int | None, unreadable: bool, failures: int, losses: Sequence[float]
    ) -> StepStatus:
        """Exchange the processes' reports in one message; all must call it."""
        table = world.gather([signum or 0, unreadable, failures, *losses])
        return cls(table[:, 0], table[:, 1], table[:, 2], table[:, 3:])

    def mean_loss(self) -> float:
        """The loss of the whole batch."""
        return float(self.losses.flatten().sum()) / self.losses.numel()


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

    Resumes from the newest valid checkpoint in ``storage.output``, if there is one, with losses
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
        """Resume from the newest valid checkpoint, if there is one."""
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
            self.log = stack.enter_context(closing(StepLog(output / "log.jsonl", step, self.note)))
            self.metrics = stack.enter_context(closing(StepLog(output / "metrics.jsonl", step, self.note)))
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
            prune_checkpoints(self.storage.output, outcome.step, self.storage.max_checkpoints)
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
        status = StepStatus.gather(self.world, request.signum, unreadable, len(failures), losses)
        if status.failures.any():
            self._report_failures(failures)
        if status.unreadable.any():
            self._data_is_gone(failures)
        if not status.losses.isfinite().all() or not math.isfinite(norm):
            self._not_finite(batch, status.losses, lr)
        if signum := int(status.signum.max()):
            self.outcome.stop_signal = signum
        if config.clip_grad is not None:
            total = torch.tensor(norm, dtype=config.dtype)
            torch.nn.utils.clip_grads_with_norm_(self.task.model.parameters(), config.clip_grad, total)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.task.model)
        return status.mean_loss(), norm

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
        try:
            self.log.write({**record, "seconds": round(outcome.seconds, 3)})
            self.board.write(outcome.step, {"loss": loss, "lr": lr, "grad_norm": norm, "images_per_second": rate})
        except OSError as error:
            self._log_failed(error)

    def _log_failed(self, error: OSError) -> None:
        more = ""
        if self.world.size == 1:  # else the others are on their way to the next step
            try:
                self.save()
            except (UserError, OSError) as another:
                more = f" Nor can it be saved: {another}."
        raise UserError(
            f"step {self.outcome.step} cannot be logged: {describe_os_error(error)}.{more} {self._saved_where()}"
        ) from error

    def _save_due(self, stop: int) -> bool:
        step, every = self.outcome.step, self.storage.save_every
        at_end = step == stop or step % self.task.config.steps_per_epoch == 0
        return at_end or (every > 0 and step % every == 0)

    def _saved_where(self) -> str:
        if self.outcome.checkpoint is None:
            return "No checkpoint had been written yet."
        return f"The last checkpoint is {self.outcome.checkpoint}."
