"""Compiles the extension for the GPU at hand; unchanged objects are reused."""

from __future__ import annotations

import subprocess
import sys
import time

from .. import ROOT
from .results import Recorder
from .runner import run_logged
from .setting import Setting

_PROBE = """
import convnextv2_kernels, torch, sys
from convnextv2_kernels import backends
print(convnextv2_kernels.info(), file=sys.stderr)
cuda = backends.REGISTRY["cuda"]
print(cuda.load_error() or cuda.unsupported_reason(cuda.device_type, torch.bfloat16) or "yes")
"""


def run(setting: Setting, recorder: Recorder) -> None:
    import torch

    log = setting.folder / "build.log"
    log.unlink(missing_ok=True)
    if setting.dry_run:
        # the emulation is built beforehand; this stands in for the compilation
        command, more = [sys.executable, "setup.py", "--version"], {}
    else:
        major, minor = torch.cuda.get_device_capability()
        command, more = (
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"},
        )
    start = time.monotonic()
    code = run_logged(command, log, setting, setting.remaining(), **more)
    seconds = time.monotonic() - start
    recorder.put(command=" ".join(command[1:]), environment=more, build_seconds=seconds, exit_code=code)
    if code != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        recorder.put(log_tail=tail)
        raise RuntimeError(
            "the build took too long" if code is None else f"the build ended with code {code}: {tail[-1]}"
        )
    # a new process: the module built just now, not one loaded before
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, env=setting.environment(), cwd=ROOT, timeout=120
    )
    with log.open("a") as file:
        file.write(done.stderr)
    answer = (done.stdout.strip().splitlines() or [f"the library does not load: {done.stderr.strip()[-200:]}"])[-1]
    recorder.put(backend_available=answer)
    if answer != "yes" and setting.backend == "cuda":
        raise RuntimeError(f"the backend cuda cannot run: {answer}")
