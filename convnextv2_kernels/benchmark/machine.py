"""The machine: the device in use and its free memory, and what the figures of a run depend on."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from .. import backends
from ..version import __version__

DEVICES = ("cpu", "cuda")
OUT_OF_MEMORY = "out of memory"  # why something was not measured
# By name; "auto" chooses among them.
BACKENDS = tuple(backends.REGISTRY)
_VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "MALLOC_")
_VARIABLES += ("GLIBC_TUNABLES", "CONVNEXTV2_KERNELS_")


def default_device() -> str:
    """ "cuda" where PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def unsupported_reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run tensors of this dtype on a device, None if it can."""
    return backends.unsupported_reason(backend, device, dtype)


def automatic_backend(device: str, dtype: torch.dtype) -> str:
    """The backend that "auto" takes."""
    return backends.automatic(device, (dtype,))


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


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of PyTorch for a while; None changes nothing."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


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


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def cpu_model() -> str:
    """Name of the CPU."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, str]:
    """Sizes of the first core's caches, such as {"L2 Unified": "1024K"}; empty off Linux."""
    caches = {}
    for index in sorted(root.glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and kind and size:
            caches[f"L{level} {kind}"] = size
    return caches


def ram_bytes() -> int | None:
    """Physical memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def git_commit() -> dict | None:
    """Commit of the source tree and whether it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    options = {"capture_output": True, "text": True, "check": True, "timeout": 30}
    try:
        commit, changes = (
            subprocess.run([*git, *command], **options).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(changes)}


def backend_table(device: str = "cpu") -> dict[str, dict[str, str]]:
    """For each backend and dtype on a device: "yes", or why it cannot run."""
    table: dict[str, dict[str, str]] = {}
    for name in BACKENDS:
        table[name] = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            reason = unsupported_reason(name, device, dtype)
            table[name][str(dtype).removeprefix("torch.")] = reason or "yes"
    return table


def why_busy(description: dict) -> str | None:
    """That other programs will disturb the times, where the load average says so."""
    load, cores = description["load_average"], description["cores"]
    if load is None or not cores or load[0] <= 0.5 * cores:
        return None
    return f"load average is {load[0]:.1f} on {cores} cores: other programs will disturb timing"


def describe(device: str = "cpu") -> dict:
    """JSON-ready description of the machine, the device in use and the software."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "device": device,
        "gpu": gpu_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": ram_bytes(),
        "caches": cpu_caches(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "package": __version__,
        "backend": backends.forced(),
        "backends": backend_table(device),
        "git": git_commit(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }
