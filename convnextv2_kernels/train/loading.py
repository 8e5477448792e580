"""Batches from processes, or a thread, that may stop, die, or wait for a file that never comes.

The main thread never waits for a file or a process itself: a thread of its own asks PyTorch's DataLoader for the next
batch, and the main thread looks five times a second whether a signal came, a process died, or nothing was read for
too long. Each loader says in a small shared array which image it is reading.
"""

from __future__ import annotations

import copy
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import RawArray
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .._console import visible
from ..errors import UserError, describe_error
from .signals import start_loader

TIMEOUT = 300.0
POLL = 0.2  # seconds between two looks at signals and processes
PREFETCH = 2  # batches that each process loads ahead
SHARED_MEMORY = Path("/dev/shm")  # where Linux has it; elsewhere nobody limits it
# What the array holds of each loader: the place of its image and 1, or 0 between two samples; since when, in ns; how
# many samples it began.
_PLACE, _SINCE, _COUNT, _FIELDS = 0, 1, 2, 3


class LoaderError(UserError):
    """No batch will come: one sentence that says which loader and which image, as well as it can be known."""


@dataclass(frozen=True)
class Loading:
    """``workers`` processes load images, or with 0 a thread; ``timeout`` is the longest time in seconds in which none
    of them may begin an image while a batch is waited for."""

    workers: int = 0
    timeout: float = TIMEOUT


class _Sources(Sequence):
    """The sources of a dataset, which notes in ``board`` which one was asked for last."""

    def __init__(self, sources: Sequence, board: Any):
        self.sources, self.board = sources, board

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int):
            row = _row()
            self.board[row + _PLACE], self.board[row + _SINCE] = place + 1, time.monotonic_ns()
        return self.sources[place]


class _Watched(Dataset):
    """A dataset that notes in ``board`` when a sample begins and ends."""

    def __init__(self, dataset: Dataset, board: Any):
        self.dataset, self.board = _with_noted_sources(dataset, board), board

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        row = _row()
        self.board[row + _COUNT] += 1
        try:
            return self.dataset[key]
        finally:
            self.board[row + _PLACE] = 0


def _row() -> int:
    worker = get_worker_info()
    return _FIELDS * (0 if worker is None else worker.id)


def _with_noted_sources(dataset: Dataset, board: Any) -> Dataset:
    twin = copy.copy(dataset)
    if isinstance(getattr(dataset, "dataset", None), Dataset):  # a part of another one
        twin.dataset = _with_noted_sources(dataset.dataset, board)
    elif hasattr(dataset, "sources"):
        twin.sources = _Sources(dataset.sources, board)
    return twin


class _NoSharedMemory:
    """In place of a batch, which could not be shared."""


class _Shared:
    """``collate`` whose tensors are shared in the loading process: where that fails later, in a thread of its queue,
    the batch is lost without a word."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is None:
            return batch
        try:
            for value in vars(batch).values():
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        except RuntimeError:
            return _NoSharedMemory()
        return batch


class Loader:
    """Batches of a dataset, one at a time, by :meth:`next` or as an iterator that takes no heed of signals.

    Args:
        dataset: where it has ``sources``, errors name them.
        collate: makes of samples a batch, an object whose attributes may be tensors.
        device: where batches go: for a GPU they lie in page-locked memory.
        order: ``batch_sampler``, or ``batch_size``, of a DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[list[Any]], Any],
        loading: Loading,
        device: torch.device | None = None,
        **order: Any,
    ):
        self._loading, self._dataset = loading, dataset
        self._board = RawArray("q", _FIELDS * max(1, loading.workers))
        self._gpu = device if device is not None and device.type == "cuda" else None
        if self._gpu is not None and self._gpu.index is None:
            self._gpu = torch.device("cuda", torch.cuda.current_device())
        self._loader = DataLoader(
            _Watched(dataset, self._board),
            num_workers=loading.workers,
            prefetch_factor=PREFETCH if loading.workers else None,
            collate_fn=_Shared(collate),
            worker_init_fn=start_loader,
            pin_memory=self._gpu is not None,
            generator=torch.Generator(),  # keeps the loader from drawing its seed from the global stream
            **order,
        )
        self._workers: list[Any] = []
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._asked = self._closing = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for _ in range(len(self)):
                yield self.next()

    def next(self, stopped: Callable[[], bool] = lambda: False) -> Any:
        """Return the next batch, or None where ``stopped`` became true before it came.

        Raises:
            LoaderError: a loader died, none of them read anything for ``timeout`` seconds, or shared memory is full.
        """
        if self._thread is None:
            # A daemon: the end of the program does not wait for a file that never comes.
            self._thread = threading.Thread(target=self._serve, name="loader", daemon=True)
            self._thread.start()
        if not self._asked:
            self._requests.put(True)
            self._asked = True
        waited, begun, last = 0.0, self._begun(), time.monotonic()
        while True:
            try:
                batch, error = self._answers.get(timeout=POLL)
                break
            except queue.Empty:
                pass
            if stopped():
                return None
            self._require_alive()
            now = time.monotonic()
            # A pause of the whole program (Ctrl-Z) is not the loaders' fault.
            waited, last = waited + min(now - last, 5 * POLL), now
            if self._begun() != begun:
                waited, begun = 0.0, self._begun()
            if waited > self._loading.timeout:
                raise LoaderError(self._silence())
        self._asked = False
        if error is not None:
            self._require_alive(patience=1.0)
            raise error
        if isinstance(batch, _NoSharedMemory):
            raise LoaderError(f"shared memory is full ({_free_text()}); {_REMEDY}")
        return batch

    def close(self) -> None:
        """End the loaders, whatever they do: they hold nothing that could be lost, and a stopped one or one that waits
        for a file heeds no other signal."""
        self._closing = True
        self._kill()
        if self._thread is not None:
            self._requests.put(False)
            if not self._asked:
                self._thread.join(5)
        for process in self._workers:
            process.join(1)
        self._workers = []

    def _kill(self) -> None:
        for process in self._workers:
            process.kill()

    def _serve(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # of this thread: the DataLoader's pins memory for it
            iterator = iter(self._loader)
            self._workers = list(getattr(iterator, "_workers", []))
            if self._closing:
                self._kill()
        except Exception as error:
            self._answers.put((None, _failed_start(error)))
            return
        while self._requests.get():
            try:
                self._answers.put((next(iterator), None))
            except Exception as error:
                self._answers.put((None, error))

    def _begun(self) -> int:
        return sum(self._board[_COUNT::_FIELDS])

    def _require_alive(self, patience: float = 0.0) -> None:
        """Raise LoaderError where a loading process has ended; wait for ``patience`` seconds whether one does."""
        deadline = time.monotonic() + patience
        while True:
            for number, process in enumerate(self._workers):
                if process.exitcode is not None:
                    raise LoaderError(f"{self._name(number)} {_how_it_ended(process.exitcode)}{self._reading(number)}")
            if time.monotonic() >= deadline:
                return
            time.sleep(0.05)

    def _name(self, number: int) -> str:
        if not self._workers:
            return "the thread that loads images"
        return f"loader {number + 1} of {len(self._workers)} (process {self._workers[number].pid})"

    def _reading(self, number: int, words: str = " while it read ") -> str:
        """``words`` and the image of a loader, where it has one."""
        place = self._board[_FIELDS * number + _PLACE]
        dataset: Any = self._dataset
        while not hasattr(dataset, "sources") and hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        sources = getattr(dataset, "sources", ())
        if not 0 < place <= len(sources):
            return ""
        source = sources[place - 1]
        return words + (visible(str(source)) if isinstance(source, (str, Path)) else f"image {place}")

    def _silence(self) -> str:
        """What is known of why nothing is read."""
        text = f"no image was read for {self._loading.timeout:g} s (--loader-timeout): "
        states = [_state(process.pid) for process in self._workers]
        if "T" in states:
            number = states.index("T")
            return f"{text}{self._name(number)} is stopped{self._reading(number)}, by SIGSTOP or a debugger"
        busy = [n for n in range(max(1, len(self._workers))) if self._board[_FIELDS * n + _PLACE]]
        if not busy:
            return f"{text}the loaders do not answer"
        number = min(busy, key=lambda n: self._board[_FIELDS * n + _SINCE])
        return f"{text}{self._name(number)} waits for{self._reading(number, ' ')}, whose file system may hang"


def _failed_start(error: Exception) -> Exception:
    if isinstance(error, OSError):
        return LoaderError(f"the loaders cannot be started ({describe_error(error)}); try fewer --workers, or 0")
    return error


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = {
        "SIGKILL": " (is the machine out of memory? fewer --workers need less)",
        "SIGBUS": f" (shared memory is full, {_free_text()}; {_REMEDY})",
    }.get(name, "")
    return f"was ended by {name}{hint}"


def _state(pid: int) -> str:
    """The state of a process on Linux, one letter; "" elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


_REMEDY = "take fewer --workers, or 0, or give more (docker run --shm-size)"


def _free_bytes() -> int | None:
    if not SHARED_MEMORY.is_dir():
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def _free_text() -> str:
    free = _free_bytes()
    return "of unknown size" if free is None else f"{free / 1e6:.1f} MB are free in {SHARED_MEMORY}"


def require_shared_memory(workers: int, *batches: int) -> None:
    """Raise UserError where the batches that ``workers`` processes load ahead do not fit in shared memory.

    Loaders without it would be killed, or wait for ever. ``batches`` are the bytes of a batch of each loader that works
    at a time; on one machine every process of a run has as many loaders.
    """
    free = _free_bytes()
    if not workers or free is None:
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Those that are loaded, and one that is computed with.
    needed = processes * sum(batches) * (PREFETCH * workers + 1)
    if needed <= free:
        return
    fitting = max(0, (free // (processes * sum(batches)) - 1) // PREFETCH)
    raise UserError(
        f"--workers {workers}: the images that they load ahead need {needed / 1e6:.0f} MB of shared memory"
        + (f" for {processes} processes" if processes > 1 else "")
        + f", and {_free_text()}; give more (docker run --shm-size), or take --workers {fitting}."
    )
