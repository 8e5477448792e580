"""What the figures of a run depend on: machine, software, settings."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from .. import backends
from ..version import __version__
from .device import gpu_name

_VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "MALLOC_")
_VARIABLES += ("GLIBC_TUNABLES", "CONVNEXTV2_KERNELS_")


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
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(changes)}


def backend_table(device: str = "cpu") -> dict[str, dict[str, str]]:
    """For each backend and dtype on a device: "yes", or why it cannot serve."""
    table: dict[str, dict[str, str]] = {}
    for name in ("reference", "cpu", "cuda", "triton"):
        table[name] = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            reason = backends.why_not(name, device, dtype)
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
