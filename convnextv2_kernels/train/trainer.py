"""The training loop and the tasks it trains: exact resume, atomic checkpoints, a clean stop on a signal, on any number
of processes.

Steps are counted by the number completed: after step k the weights have been updated k times, the
log has k lines, and checkpoint-k.pt holds all that step k + 1 depends on.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .._files import remove_abandoned
from .._progress import Progress
from ..backends import use_backend
from ..data.images import StepSampler
from ..errors import UserError, describe_os_error
from .checkpoint import (
    gather_state,
    newest_valid,
    prune_checkpoints,
    restore_state,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from .checkpoint_checks import Expected, check_settings, check_state
from .config import RunConfig, environment, environment_notes, require_same_config
from .distributed import World, gradient_sync, share_buffers, spread
from .loading import TIMEOUT, Loader, LoaderError, Loading
from .loggers import Board, StepLog
from .nonfinite import first_gradient, first_in_forward
from .optim import Average, lr_at_step, make_optimizer, set_lr
from .peers import PeerLost
from .signals import Stopped, StopRequest


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

    def evaluates(self, epoch: int) -> bool:
        """Whether something is to be done after a 0-based epoch."""

    def epoch_done(self, trainer: Trainer, epoch: int) -> None:
        """Do it. Called in all processes after the checkpoint of the epoch's last step; raises
        :class:`.signals.Stopped` where a signal came before it was done, and is called again when the run is resumed.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember of the task."""

    def check(self, state: Any, step: int) -> None:
        """Raise ValueError, in a sentence that names the field, where ``state`` is nothing that :meth:`state` returns
        after ``step`` steps."""

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

    The sum is the same whatever the split, up to the order of its terms. ``workers`` and ``loader_timeout`` say how
    images are loaded, as in :class:`.loading.Loading`.
    """

    world: World = World()  # noqa: RUF009  (immutable)
    parallel: str = "ddp"
    accumulate: int = 1
    workers: int = 0
    loader_timeout: float = TIMEOUT

    @property
    def loading(self) -> Loading:
        """How images are loaded."""
        return Loading(self.workers, self.loader_timeout)


class StepStatus(NamedTuple):
    """What each process reports of a step, float64, in the order of ranks: the same in all processes.

    ``unreadable [size]``: 1 where there were no images. ``failures [size]``: files that could not be read.
    ``losses [size, accumulate]``: of each part of the images.
    """

    unreadable: Tensor
    failures: Tensor
    losses: Tensor

    @classmethod
    def gather(cls, world: World, unreadable: bool, failures: int, losses: Sequence[float]) -> StepStatus:
        """Exchange the processes' reports in one message; all must call it."""
        table = world.gather([unreadable, failures, *losses])
        return cls(table[:, 0], table[:, 1], table[:, 2:])

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
    without changing the schedule. On a signal to stop (:class:`.signals.StopRequest`) the step at hand is finished and
    saved and ``Outcome.stop_signal`` is set. Raises UserError where the settings differ from the checkpoint's, a loss
    or gradient is no finite number, images or checkpoints cannot be read or written, loaders of images die or stay
    silent, or another process does.
    """
    run = Trainer(task, storage, split or Spread(), note)
    total = task.config.total_steps
    stop = total if max_steps is None else min(max_steps, total)
    run.resume()
    if run.outcome.step < stop or run.pending:
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
        with world.exchanges():
            self.network = spread(task.model, world, split.parallel, self.device)
        self.optimizer = make_optimizer(task.parameter_groups(), config.lr, config.betas)
        self.average = None if config.ema_decay is None else Average(task.model, config.ema_decay)
        self.outcome = Outcome(step=0, total_steps=config.total_steps)
        self.environment = {**environment(), "processes": world.size, "accumulate": split.accumulate}
        self.share = config.batch_size // world.size
        self.request = StopRequest()
        # Whether the epoch that ends at this step is still to be evaluated, and whether a checkpoint knows all of this.
        self.pending, self.saved = False, True
        # Held while weights, step and log change together, or something else is in the place of the weights.
        self.unsettled = threading.Lock()

    def resume(self) -> None:
        """Resume from the newest valid checkpoint, if there is one."""
        if not self.storage.checkpoints:
            return
        state: dict[str, Any] | None = None
        expected = Expected.of(self.task, self.optimizer, self.average)

        def check(found: dict[str, Any], step: int, path: Path) -> None:
            check_settings(found, self.task.config)
            require_same_config(found["config"], self.task.config, str(path), path)
            check_state(found, step, expected)

        def find() -> dict[str, Any] | None:
            nonlocal state
            remove_abandoned(self.storage.output)
            state, path, warnings = newest_valid(self.storage.output, check)
            for warning in warnings:
                self.note(f"warning: {warning}")
            if state is None:
                return None
            for text in environment_notes(state.get("environment", {}), self.environment):
                self.note(f"note: {text}")
            # A kill may have come between the writing of a checkpoint and this.
            prune_checkpoints(self.storage.output, state["step"], self.storage.max_checkpoints)
            known = {name: state[name] for name in ("step", "rng", "task")}
            # Of older checkpoints, which were written after the evaluation, it is not recorded.
            return {"path": path, **known, "pending": bool(state.get("evaluation_pending", False))}

        found = self.world.from_main(find)
        if found is None:
            return
        with self.world.exchanges():
            restore_state(self.task.model, self.optimizer, self.average, state, self.world)
        set_rng_state(found["rng"])
        self.task.restore(found["task"])
        self.outcome.step, self.pending = found["step"], found["pending"]
        self.outcome.resumed_from = self.outcome.checkpoint = found["path"]

    def open_logs(self, stack: ExitStack) -> None:
        """Open log.jsonl, metrics.jsonl and the scalars of TensorBoard, in the first process."""
        self.log = self.metrics = self.board = None
        output, step = self.storage.output, self.outcome.step

        def enter() -> None:
            self.log = stack.enter_context(closing(StepLog(output / "log.jsonl", step, self.note)))
            # Of an evaluation that is to be done again no line is kept.
            metrics = StepLog(output / "metrics.jsonl", step - self.pending, self.note)
            self.metrics = stack.enter_context(closing(metrics))
            folder = output / "tensorboard" if self.storage.tensorboard else None
            self.board = stack.enter_context(closing(Board(folder, step)))

        self.world.from_main(enter)

    def advance(self, stop: int, request: StopRequest) -> None:
        """Train up to ``stop`` steps, or until a signal in any process."""
        self.request = request
        if self.world.watch is not None:
            self.world.watch.begin(request, self._save_alone)
        with Progress("step", stop, self.outcome.step, quiet=not self.world.is_main) as progress:
            self.progress = progress
            try:
                self._advance(stop)
            except PeerLost as error:
                raise PeerLost(f"{error} {self._save_alone()}".rstrip(), error.code) from error

    def _advance(self, stop: int) -> None:
        outcome, config = self.outcome, self.task.config
        begun = time.monotonic()
        if self.pending and not self._evaluate():
            return
        self.network.train()
        with self._loader(stop) as loader:
            while outcome.step < stop:
                batch = self._next_batch(loader)
                if batch is None:
                    self.save()
                    return
                lr = lr_at_step(outcome.step, config.total_steps, config.warmup_steps, config.lr, config.min_lr)
                self._step(batch, lr, begun)
                if self._save_due(stop):
                    self.save()
                if self.pending and not self._evaluate():
                    return
        self.save()

    def _next_batch(self, loader: Loader) -> Any:
        """Return this process's images of a step; None where some process was told to stop."""
        batch = failure = None
        try:
            batch = loader.next(lambda: self.signum() is not None)
        except LoaderError as error:
            failure = str(error)
        signums, failed = self.world.gather([self.signum() or 0, failure is not None]).T
        if failed.any():
            self._loaders_failed(failure)
        if signums.any():
            self.outcome.stop_signal = int(signums.max())
            return None
        return batch

    def signum(self) -> int | None:
        """A signal to stop, in this process or in another; None without one."""
        return self.request.signum or self.world.signum()

    def _evaluate(self) -> bool:
        """Do what the task does after an epoch; return False where a signal came first."""
        try:
            with self.unsettled, self.world.exchanges():
                share_buffers(self.task.model, self.world)
                self.task.epoch_done(self, self.outcome.step // self.task.config.steps_per_epoch - 1)
        except Stopped as stopped:
            self.outcome.stop_signal = stopped.signum
            return False
        finally:
            self.network.train()
        self.pending = self.saved = False
        return True

    def save(self) -> None:
        """Write a checkpoint and drop the oldest, unless one has it all. All processes must call it."""
        if self.saved or not self.storage.checkpoints:
            return
        with self.world.exchanges():
            state = gather_state(self.task.model, self.optimizer, self.average)
        self.outcome.checkpoint = self.world.from_main(lambda: self._write_checkpoint(state))
        self.saved = True

    def _write_checkpoint(self, state: dict[str, Any]) -> Path:
        outcome, config = self.outcome, self.task.config
        epoch, position = divmod(outcome.step, config.steps_per_epoch)
        self.log.sync()
        self.metrics.sync()
        extra = {"epoch": epoch, "position": position, "rng": rng_state(), "task": self.task.state()}
        extra.update(config=config.to_dict(), environment=self.environment, evaluation_pending=self.pending)
        path = write_checkpoint(self.storage.output, outcome.step, {**state, **extra})
        prune_checkpoints(self.storage.output, outcome.step, self.storage.max_checkpoints)
        return path

    def _save_alone(self) -> str:
        """Where another process is lost, save what this one can without it; return where the run stands.

        Copies of the model are whole in every process, shards are not. May be called by another thread while the main
        one waits inside PyTorch for the lost process, before it touches the weights; a GPU would be waited for too.
        """
        able = self.device.type == "cpu" or threading.current_thread() is threading.main_thread()
        if self.world.is_main and able and self.unsettled.acquire(timeout=1):
            try:
                self._save_copy()
            finally:
                self.unsettled.release()
        return self._saved_where() if self.world.is_main else ""

    def _save_copy(self) -> None:
        if (self.world.size == 1 or self.split.parallel == "ddp") and self.storage.checkpoints and not self.saved:
            state = gather_state(self.task.model, self.optimizer, self.average)
            self.outcome.checkpoint = self._write_checkpoint(state)
            self.saved = True

    def _loader(self, stop: int) -> Loader:
        config, begin = self.task.config, self.world.rank * self.share
        part = (begin, begin + self.share)
        sampler = StepSampler(len(self.task.dataset), config.batch_size, config.seed, self.outcome.step, stop, part)
        return Loader(self.task.dataset, self.task.collate, self.split.loading, self.device, batch_sampler=sampler)

    def _step(self, batch: Any, lr: float, begun: float) -> None:
        """Update the weights, and write the loss of the whole batch and the norm of its gradient to the logs."""
        config, failures = self.task.config, batch.failures
        unreadable = batch.images is None
        if unreadable:  # The other processes wait in this step's exchanges: go through it, then stop all.
            batch = self.task.placeholder(self.share)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        # One wait for the device: losses and norm are read back together.
        with self.world.exchanges():
            *losses, norm = torch.cat([self._gradients(batch), self._gradient_norm()[None]]).tolist()
        status = StepStatus.gather(self.world, unreadable, len(failures), losses)
        if status.failures.any():
            self._report_failures(failures)
        if status.unreadable.any():
            self._data_is_gone(failures)
        if not status.losses.isfinite().all() or not math.isfinite(norm):
            self._not_finite(batch, status.losses, lr)
        if config.clip_grad is not None:
            total = torch.tensor(norm, dtype=config.dtype)
            torch.nn.utils.clip_grads_with_norm_(self.task.model.parameters(), config.clip_grad, total)
        with self.unsettled:
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.task.model)
            self.outcome.step += 1
            self.outcome.losses.append(status.mean_loss())
            self.outcome.seconds = time.monotonic() - begun
            epoch, position = divmod(self.outcome.step, config.steps_per_epoch)
            self.pending, self.saved = position == 0 and self.task.evaluates(epoch - 1), False
            self._write(status.mean_loss(), lr, norm)

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

    def _loaders_failed(self, failure: str | None) -> None:
        self.save()
        reason = next(filter(None, self.world.gather_objects(failure)))
        raise UserError(f"step {self.outcome.step + 1}: {reason}. {self._saved_where()}")

    def _data_is_gone(self, failures: list[tuple[str, str]]) -> None:
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
        try:
            self._save_copy()  # without the others, which are on their way to the next step
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
