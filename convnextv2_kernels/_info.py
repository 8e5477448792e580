"""What this installation is, and which backend runs each op, and why."""

from __future__ import annotations

import os
import platform
from types import ModuleType

import torch

from . import backends, ops, schedule
from .backends import cuda, native, triton
from .dtypes import FLOAT_DTYPES
from .settings import VARIABLES, current
from .version import __version__


def serving_backends(device_type: str) -> dict[str, dict[str, str]]:
    """``{op: {dtype name: backend}}`` for tensors of a device under the current choice.

    A forced backend that does not support a dtype is shown as "error"."""
    table: dict[str, dict[str, str]] = {}
    for op in ops.__all__:
        table[op] = {}
        for dtype in FLOAT_DTYPES:
            name = str(dtype).removeprefix("torch.")
            table[op][name] = _serving(device_type, dtype)
    return table


def _serving(device_type: str, dtype: torch.dtype) -> str:
    if backends.forced() != "auto":
        return "error" if backends.unsupported_reason(backends.forced(), device_type, dtype) else backends.forced()
    return backends.automatic(device_type, (dtype,))


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _extension_lines() -> list[str]:
    if native.module is None:
        return [f"extension          not loaded: {native.load_error}"]
    build = native.module.build_info()
    isa, width = native.module.cpu_isa()
    from .backends import cpu_gemm

    return [
        f"extension          version {build['version']}, {build['compiler']}, against PyTorch {build['torch']} "
        f"(stable ABI {build['torch_target']}), sanitizer {build['sanitizer']}",
        f"cpu kernels        {isa} ({8 * width}-bit vectors) of {', '.join(build['cpu_isas'])}; float32 GEMMs "
        f"by {cpu_gemm.vendor()}",
        "cuda kernels       " + _cuda_kernels(build),
        *_cuda_convolutions(native.module, build),
    ]


def _cuda_kernels(build: dict) -> str:
    if cuda.EMULATED:
        return f"emulated on the CPU by {current.cuda_emulation}, for tests"
    if build["cuda"] is None:
        return "not built"
    return f"compiled by nvcc {build['cuda']} for {', '.join(build['cuda_architectures'])}"


def _cuda_convolutions(module: ModuleType, build: dict) -> list[str]:
    """Which CUDA kernel runs the block's convolution in the four stages of tiny."""
    if build["cuda"] is None:
        return []
    lines = []
    for side, channels in ((8, 96), (4, 192), (2, 384), (1, 768)):
        row = module.cuda_conv_kernel("bfloat16", side, channels, normalize=True)
        norm = "with LayerNorm" if row["fused_norm"] else "LayerNorm after it"
        lines.append(
            f"  side {side}, C = {channels:<6}{row['kernel']}, {norm}, {row['threads']} threads, "
            f"{row['shared_bytes'] / 1024:.1f} KiB shared"
        )
    return lines


def _triton_lines() -> list[str]:
    """Triton, and on a GPU which GEMMs of the MLP it fuses in the four stages of tiny."""
    if triton.load_error() is not None:
        return [f"triton kernels     not there: {triton.load_error()}"]
    version = triton.version()
    if triton.INTERPRETED:
        return [f"triton kernels     Triton {version}, interpreted on the CPU, for tests"]
    reason = triton.unsupported_reason("cuda", torch.bfloat16)
    if reason is not None:
        return [f"triton kernels     Triton {version}; {reason}"]
    from .backends.triton import plans

    lines = [f"triton kernels     Triton {version}, plans of {plans.family()}; GEMMs of tiny in bfloat16:"]
    for rows, channels in ((1216, 96), (304, 192), (76, 384), (19, 768)):
        plan = plans.choose(plans.Shape(torch.bfloat16, channels, 4 * channels, channels, rows))
        ways = ["fused" if fused else "library" for fused in (plan.forward_fused, plan.backward_fused)]
        lines.append(f"  C = {channels:<15}forward {ways[0]}, backward {ways[1]} ({plan.source})")
    return lines


def info() -> str:
    """A report for people: versions, compiled kernels, the backend table with reasons, and the environment."""
    lines = [
        f"convnextv2_kernels {__version__}",
        f"python             {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"pytorch            {torch.__version__}, {torch.get_num_threads()} CPU threads, CUDA "
        + (str(torch.version.cuda) if torch.cuda.is_available() else "not available"),
        *_extension_lines(),
        *_triton_lines(),
        f"saved for backward {', '.join(f'{d}: {schedule.save_policy(d)}' for d in _devices())}",
        "",
        f"backend            {backends.forced()}",
    ]
    for name, backend in backends.REGISTRY.items():
        device = backend.device_type or "cpu"
        reason = backend.unsupported_reason(device, torch.float32)
        if reason is None and device == "cuda" and not torch.cuda.is_available():
            reason = "compiled, but PyTorch sees no GPU"
        lines.append(f"  {name:<16} " + ("available" if reason is None else f"not available: {reason}"))
    for device in _devices():
        table = serving_backends(device)
        lines += ["", f"ops on {device}:", f"  {'op':<30}" + "".join(f"{str(d)[6:]:<12}" for d in FLOAT_DTYPES)]
        lines += [f"  {op:<30}" + "".join(f"{b:<12}" for b in row.values()) for op, row in table.items()]
        for name in backends.PREFERENCE.get(device, ()):
            found = {backends.unsupported_reason(name, device, d) for d in FLOAT_DTYPES}
            reasons = sorted(reason for reason in found if reason is not None)
            lines += [f"  {name} does not support everything because {reason}" for reason in reasons]
    lines += ["", "environment:"]
    lines += [f"  {name:<34} {os.environ.get(name, '(not set)')}" for name in (variable.name for variable in VARIABLES)]
    return "\n".join(lines)
