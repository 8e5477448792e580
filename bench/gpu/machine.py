"""What the figures depend on: the GPU as it is found (nothing is set), the software, the sources."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess

from convnextv2_kernels.benchmark.machine import git_commit

from .. import ROOT
from .results import Recorder
from .setting import Setting

_QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


def source_digest() -> str:
    """Of everything that decides what is measured: kernels, library, this program."""
    digest = hashlib.sha256()
    library = (("csrc", "*/*"), ("convnextv2_kernels", "**/*.py"), ("convnextv2_kernels", "**/*.json"))
    for folder, pattern in (*library, ("bench", "**/*.py")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power limit and temperature as reported; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=" + ",".join(_QUERY), "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        return {"error": done.stderr.strip()[:200] or done.stdout.strip()[:200]}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(_QUERY, values, strict=True))


def gpu() -> dict:
    """Properties PyTorch reports of the current GPU; raises without one."""
    import torch

    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "compute_capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "memory_bytes": p.total_memory,
        "nvidia_smi": nvidia_smi(),
    }


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def run(setting: Setting, recorder: Recorder) -> None:
    import torch

    commit = git_commit()
    recorder.put(
        date_utc=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=commit and commit["commit"],
        cores=os.cpu_count(),
        os=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        triton=_version("triton"),
        float32_matmul="tf32 off (PyTorch's default)",
    )
    recorder.put(gpu={"name": "none (dry run)"} if setting.dry_run else gpu())
