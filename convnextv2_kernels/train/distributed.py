"""The processes of a run: who they are, how they agree, and how a model is spread over them.

``torchrun`` says through the environment how many processes there are. Control messages (losses, a signal to stop, an
error) are a few numbers a step and go over a gloo group of their own, so that they never wait for a GPU.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .._interrupts import STOPPING
from ..errors import UserError
from ..nn import ConvNeXtV2Block
from .peers import ANSWER, TIMEOUT, PeerLost, Watch, exit_at_the_end

PARALLEL = ("ddp", "fsdp")
# Of control messages, during which Watch sees whether the others live: the first process may check a folder of millions
# of images while they wait.
_PATIENCE = timedelta(days=30)
_POLL = timedelta(milliseconds=200)
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run: ``rank`` of ``size``; ``group`` carries control messages and is None for one process.

    Whoever waits for a control message heeds signals, and raises :class:`.peers.PeerLost` where another process has
    ended or, as far as ``watch`` sees, gives no sign of life.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> torch.Tensor:
        """Return the numbers of all processes as float64 [size, len(values)], in the order of ranks."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return mine[None]
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, mine, group=self.group, async_op=True))
        return torch.stack(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return an object of each process, in the order of ranks."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for (size,) in self.gather([len(mine)])]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, padded, group=self.group, async_op=True))
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def from_main(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` in the first process and return its result in all; a UserError is raised in all."""
        if self.size == 1:
            return function()
        outcome: tuple[Any, UserError | None] = (None, None)
        if self.is_main:
            try:
                outcome = function(), None
            except PeerLost:
                raise
            except UserError as error:
                outcome = None, error
        content = torch.frombuffer(bytearray(pickle.dumps(outcome)), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        self._wait(lambda: dist.broadcast(size, src=0, group=self.group, async_op=True))
        if not self.is_main:
            content = torch.empty(int(size), dtype=torch.uint8)
        self._wait(lambda: dist.broadcast(content, src=0, group=self.group, async_op=True))
        result, failure = outcome if self.is_main else pickle.loads(content.numpy().tobytes())
        if failure is not None:
            raise failure
        return result

    def signum(self) -> int | None:
        """A signal to stop that another process was sent, or this one; None without one, or in the only process."""
        return None if self.watch is None else self.watch.signum()

    def _wait(self, begin: Callable[[], Any]) -> None:
        try:
            work = begin()
            while not work.is_completed():
                with suppress(RuntimeError):  # the time is up; what else went wrong is raised below
                    work.wait(_POLL)
                if self.watch is not None and not work.is_completed():
                    self.watch.check()
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    @contextmanager
    def exchanges(self) -> Iterator[None]:
        """Raise :class:`.peers.PeerLost` where an exchange of PyTorch's own, of gradients or weights, fails."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise self._lost(error) from error
            raise

    def _lost(self, error: RuntimeError) -> PeerLost:
        late = "imed out" in str(error) or "imeout" in str(error)
        what = "lets this one wait for too long in an exchange" if late else "has ended or cannot be reached"
        found = PeerLost(f"another process of the run {what}.")
        if self.watch is not None:
            self.watch.give_up(found)
            return self.watch.lost or found
        return found

    @contextmanager
    def guarded(self, context: AbstractContextManager) -> Iterator[None]:
        """Enter a context in the first process; where that raises a UserError, raise it in all."""
        with ExitStack() as stack:
            self.from_main(lambda: stack.enter_context(context) and None)
            yield


@contextmanager
def processes(device: str, timeout: float = TIMEOUT) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, for the time of a block; without it, be the only one.

    ``device`` is that of this process. A process counts as lost that gives no sign of life for ``timeout`` seconds, or
    that lives and lets others wait in an exchange of numbers for ten times that. Raises UserError where PyTorch cannot
    do it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if not dist.is_available():
        raise UserError("this PyTorch is built without torch.distributed: start one process, without torchrun.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    patience = timedelta(seconds=ANSWER * timeout)
    with _deadly_signals():
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=patience, device_id=torch.device(device))
        else:
            dist.init_process_group("gloo", timeout=patience)
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        watch = Watch(dist.get_rank(), size, timeout)
        dist.barrier(group)  # all have given a sign of life
    watch.start()
    try:
        yield World(dist.get_rank(), size, local_rank, group, watch)
    except BaseException as error:
        if watch.lost is not None:
            exit_at_the_end(error.code if isinstance(error, UserError) else 1)
        raise
    finally:
        watch.stop()
        if watch.lost is None:  # else PyTorch would wait for the lost process
            dist.destroy_process_group()


@contextmanager
def _deadly_signals() -> Iterator[None]:
    """Let signals end the process at once: PyTorch heeds none while it waits for others to join. Nothing is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in STOPPING}
    for signum, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def resolve_device(name: str) -> str:
    """Turn ``auto`` into a GPU where there is one, else ``cpu``; check any other name.

    Under torchrun, ``cuda`` is the GPU of the process's local rank. Raises UserError where the device cannot be
    used or a machine has more processes than GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        # All say so: the first process has a GPU of its own, and is the only one that is heard.
        if local > gpus > 0:
            raise UserError(
                f"--device cuda: {local} processes were started on this machine, which has {gpus} GPU(s); start at "
                f"most {gpus}."
            )
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}).") from error
    return name


def spread(model: nn.Module, world: World, parallel: str, device: torch.device) -> nn.Module:
    """Return the module to call in training: the model itself, or the same wrapped or sharded.

    "ddp" keeps a copy in each process; "fsdp" (FSDP2) shards parameters, gradients and optimiser state by block, and
    gathers a block's parameters when it runs. The model of the first process is everyone's.
    """
    if world.size == 1:
        return model
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
    mesh = init_device_mesh(device.type, (world.size,))
    for module in model.modules():
        if isinstance(module, ConvNeXtV2Block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 gathered, so that ``model.parameters()`` are its shards. A forward pass without a
    backward one leaves those of the outermost module gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def share_buffers(model: nn.Module, world: World) -> None:
    """Give all processes the buffers of the first, a batch norm's running statistics: DDP does so before a step, and an
    evaluation must see what a checkpoint holds."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def gradient_sync(network: nn.Module, on: bool) -> Iterator[None]:
    """Let the backward passes of a block exchange gradients, or keep them for a later one that does."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(on)
        yield
        return
    with nullcontext() if on or not hasattr(network, "no_sync") else network.no_sync():
        yield
