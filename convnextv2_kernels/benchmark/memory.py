"""Memory of a training step: bytes saved for backward, the peak of a fresh process, and which models fit at all."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..models import get_config
from .baseline import PATCH, Baseline, MaskedDenseFCMAE
from .machine import free_memory

GIB = 1 << 30
# Of what is saved for backward, for temporaries beside it: 1.04 to 1.14 were measured for base and tiny on a CPU.
TEMPORARIES = 1.25
CHECKED_IMAGES = 2


class _Packed:
    """A saved tensor, alive as long as its graph node."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: a saved result that knows its node would keep the node alive for ever.
        self.tensor = tensor.detach()


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps alive between ``forward()`` and the backward of its scalar result.

    Counts each storage packed by ``saved_tensors_hooks`` once and in full, however many views of it
    are saved, except those of ``exclude`` (parameters and inputs, alive whatever is saved). What a
    node keeps without ``save_for_backward`` is invisible here; the tests hold this count against
    that of PyTorch's allocator.
    """
    # By storage object, not by address: tensors on the meta device have none.
    excluded = {t.untyped_storage()._cdata for t in exclude}
    # Weak: what a dropped part of the graph saved is gone by the time backward starts.
    packed: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Packed:
        item = _Packed(tensor)
        packed.add(item)
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        loss = forward()
    sizes = {}
    for item in list(packed):
        storage = item.tensor.untyped_storage()
        if storage._cdata not in excluded:
            sizes[storage._cdata] = storage.nbytes()
    loss.backward()
    return sum(sizes.values())


class PeakUnavailable(RuntimeError):
    """The platform cannot tell the peak memory of a step."""


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise PeakUnavailable(f"/proc/self/status has no {field}")


def step_peak_bytes(step: Callable[[], object]) -> int:
    """Most resident memory during one warm ``step()`` beyond what is resident before it.

    Call it in a process that does nothing else. The first step is not measured: libraries compile
    kernels in it. Before the second, the C library returns free memory to the system and the
    high-water mark is reset, so that neither leftovers nor the first step count. This sees scratch
    memory of every library, which allocator statistics of PyTorch do not.

    Raises:
        PeakUnavailable: not on Linux with glibc, or /proc is not writable.
    """
    step()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError) as error:
        raise PeakUnavailable(f"peak memory needs Linux with glibc and /proc ({error})") from error
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def cuda_peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes allocated on the GPU during one warm ``step()`` beyond what is allocated before it."""
    step()
    free_memory("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_in_subprocess(arguments: Sequence[str], timeout: float) -> dict:
    """Run ``python -m convnextv2_kernels.benchmark.peak`` and return what it reports.

    Returns ``{"bytes": int}``, or ``{"bytes": None, "reason": str}`` where it was not measured.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "convnextv2_kernels.benchmark.peak", *arguments]
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"bytes": None, "reason": f"not done after {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"bytes": None, "reason": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def meta_network(model_name: str, baseline: Baseline) -> MaskedDenseFCMAE:
    """The masked dense network without memory of its own."""
    config = get_config(model_name)
    with torch.device("meta"):
        return MaskedDenseFCMAE(config.depths, config.dims, baseline=baseline)


def dense_bytes(model_name: str, batch: int, img_size: int, baseline: Baseline) -> tuple[int, int]:
    """(bytes of the parameters, bytes the masked dense step saves for backward), in float32."""
    model = meta_network(model_name, baseline)
    parameters = sum(p.nbytes for p in model.parameters())
    with torch.device("meta"):
        images = torch.empty(batch, 3, img_size, img_size)
        mask = torch.empty(batch, img_size // PATCH, img_size // PATCH, dtype=torch.bool)
    kept = saved_bytes(lambda: model(images, mask)[0], [*model.parameters(), images, mask])
    return parameters, kept


def needed_bytes(model_name: str, batch: int, img_size: int, baseline: Baseline) -> int:
    """Most memory that checks, timing and peak measurement of one model need, in float32.

    All variants share their weights, but for a few convolutions.
    """
    parameters, kept = dense_bytes(model_name, batch, img_size, baseline)
    step = parameters + TEMPORARIES * kept  # gradients, activations
    # float64 weights, gradients and activations of a few images
    check = 4 * parameters + 2 * TEMPORARIES * kept * min(CHECKED_IMAGES, batch) / batch
    # weights here, those of the control, and weights once more in the process whose peak is measured
    return int(2 * parameters + max(check, step + parameters))


def shortage(needed: int, available: int | None) -> str | None:
    """Why a model does not fit, None if it does or nobody can tell."""
    if available is None or needed <= available:
        return None
    return f"needs about {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB are available"


def parameter_count(model_name: str) -> int:
    """Parameters of FCMAE of this size."""
    return sum(p.numel() for p in meta_network(model_name, Baseline("channels_last", "conv1x1")).parameters())
