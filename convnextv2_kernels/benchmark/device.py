"""The device a benchmark runs on: its name, its free memory, waiting for it, and the peak of a step on it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

DEVICES = ("cpu", "cuda")
OUT_OF_MEMORY = "out of memory"  # why something was not measured


def default_device() -> str:
    """ "cuda" where PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Wait for all that was launched; nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def synchronized(call: Callable[[], object], device: str) -> Callable[[], None]:
    """``call`` followed by waiting for the device, so that a clock around it sees all of its work."""

    def run() -> None:
        call()
        synchronize(device)

    return run


def dense_at_its_best() -> AbstractContextManager:
    """Context in which cuDNN chooses convolutions by trial, and float32 is float32 on both sides."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)


def no_gpu(device: str) -> str | None:
    """Why a device that was asked for cannot be used, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "--device is cuda, but PyTorch sees no GPU"
    return None


def free_memory(device: str) -> None:
    """Give memory that nothing refers to back, so that one case does not starve the next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left; the CPU's allocator has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def gpu_name(device: str) -> str | None:
    """Name of the current GPU, None on a CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def available_bytes(device: str, root: Path = Path("/")) -> int | None:
    """Memory that a new program could have: of the GPU, or of the machine and this process's control group.

    None where the system does not say.
    """
    if device == "cuda":
        free_memory(device)
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    found = [_available_in_meminfo(root / "proc/meminfo"), _available_in_cgroup(root / "sys/fs/cgroup")]
    return min((number for number in found if number is not None), default=None)


def _available_in_meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _available_in_cgroup(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Files in the cache count as used, and are dropped when memory is asked for.
    dropped = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return None if limit == "max" else int(limit) - used + dropped


def cuda_peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes allocated on the GPU during one warm ``step()`` beyond what is allocated before it."""
    step()
    free_memory("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
