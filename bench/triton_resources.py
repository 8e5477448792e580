"""Compiles every Triton kernel ahead of time for GPUs that need not be there; registers, shared memory and spills.

    python -m bench resources triton            # a table
    python -m bench resources triton --write    # and bench/results/triton_resources.json, for docs/kernels/gpu.md

The launches are those the library makes itself, recorded with tensors that have shapes but no data: the same constants,
alignments and tiles as on a GPU of the family (``backends/triton/plans.json``). Triton keeps what it has compiled.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convnextv2_kernels import schedule
from convnextv2_kernels.backends.triton import TritonBackend, gemm_backward, gemm_tiles, plans, tune
from convnextv2_kernels.backends.triton.launch import FUNCTIONS, Launch, recorded_launches
from convnextv2_kernels.params import (
    GatheredMLPBackwardArgs,
    GatheredMLPForwardArgs,
    MLPGradRows,
    MLPOptions,
    MLPParams,
    MLPRows,
    NormParams,
    Places,
    RowNorm,
    Segments,
)

from . import RESULTS, ROOT

RESULT = RESULTS / "triton_resources.json"
_GPUS = json.loads((ROOT / "csrc" / "architectures.json").read_text())
TARGETS = {gpu["name"]: GPUTarget("cuda", int(gpu["name"].removeprefix("sm_")), 32) for gpu in _GPUS["cuda"]}
TARGETS |= {gpu["name"]: GPUTarget("hip", gpu["name"], 64) for gpu in _GPUS["hip"]}
# bytes of shared memory that a program may have
SHARED_LIMIT = {gpu["name"]: gpu["shared_bytes"] for gpu in (*_GPUS["cuda"], *_GPUS["hip"])}
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
_POINTERS = {
    F32: "*fp32",
    F64: "*fp64",
    BF16: "*bf16",
    F16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class MetaBackend(TritonBackend):
    """With the functions behind its operators: on the device "meta" those would be answered by their fakes."""

    @property
    def operators(self):
        assert super().operators  # which registers the functions
        return SimpleNamespace(**{name: SimpleNamespace(default=function) for name, function in FUNCTIONS.items()})


k = MetaBackend()


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def mlp(
    images: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    ragged: bool = False,
    batch: bool = False,
    keep: bool = True,
    act: str = "gelu",
) -> None:
    """Forward and backward of a block's MLP."""
    hidden, total = 4 * width, images * rows
    stat = F64 if dtype == F64 else F32
    offsets = meta(images + 1, dtype=torch.int32) if ragged else None
    segments = Segments(offsets, 1, images)
    z, rstd = meta(total, width, dtype=dtype), meta(total, dtype=stat)
    params = MLPParams(meta(hidden, width), meta(hidden), meta(hidden), meta(hidden), meta(width, hidden), meta(width))
    norm = NormParams(meta(width), meta(width))
    options = MLPOptions(act, 1e-6, batch, "hidden" if keep else "normalized", dtype)
    out, norms, kept = schedule.mlp_forward(k, MLPRows(z, z, meta(images), segments, dtype), params, norm, options)
    saved = schedule.Saved(norms, kept, norm, rstd)
    schedule.mlp_backward(k, out, MLPRows(z, None, None, segments, dtype), params, saved, options)


def gathered(kept: int, side: int, width: int, dtype: torch.dtype, norm: bool) -> None:
    """Forward and backward of a stage's MLP on the visible patches of 64 maps, of a grid of 7x7."""
    hidden, stat = 4 * width, F64 if dtype == F64 else F32
    x, slots = meta(64, 7 * side, 7 * side, width, dtype=dtype), meta(64 * kept, dtype=torch.int32)
    layer_norm = (meta(width, dtype=stat), meta(width, dtype=stat)) if norm else (None, None)
    mlp = meta(hidden, width), meta(hidden), meta(hidden), meta(hidden), meta(width, hidden)
    settings = 7, 7, False, "gelu", 1e-6, 1e-6, dtype, "triton"
    forward = GatheredMLPForwardArgs(x, *mlp, meta(width), *layer_norm, None, meta(64), slots, None, *settings)
    out, norms = schedule.run_gathered_mlp_forward(k, forward)
    backward = GatheredMLPBackwardArgs(out, x, *mlp, *layer_norm, meta(64), slots, None, norms, *settings)
    schedule.run_gathered_mlp_backward(k, backward)


def tuned(images: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """Products that few plans take, in the smallest tiles that ``tune`` tries, and what reduces them."""
    total, hidden = images * rows, 4 * width
    a, d, z = meta(total, hidden, dtype=dtype), meta(total, width, dtype=dtype), meta(total, width, dtype=dtype)
    w1, w2 = meta(hidden, width, dtype=dtype), meta(width, hidden, dtype=dtype)
    scale, segments = meta(images, hidden), Segments(None, 1, images)
    small = {name: candidates[-1] for name, candidates in tune.CANDIDATES.items()}
    gemm_backward.image_products(a, "gelu", d, w2, segments, 1, small["products"])
    gemm_backward.weight_product(a, "gelu", d, scale, segments, 32, small["weight"])
    tile = small["hidden"]
    tiles = gemm_tiles.partition(total, segments, tile.rows, allow_flat=False)
    chunk = MLPGradRows(a, d, meta(width), scale, z, meta(total), None, segments, True)
    weights = MLPParams(w1, meta(hidden), meta(hidden), meta(hidden), w2, None)
    gemm_backward.hidden_backward(chunk, weights, "gelu", (scale, scale), tiles, tile)
    k.gemms_reduce(meta(images, width, hidden), w2)


def spatial(side: int, width: int, dtype: torch.dtype, packed: bool = True, kernel: int = 7) -> None:
    """The convolution of a stage and its gradients."""
    maps = 1216 if packed else 64
    stat = F64 if dtype == F64 else F32
    radius = -(-(kernel // 2) // side)
    table = meta(maps, (2 * radius + 1) ** 2, dtype=torch.int32) if packed else None
    x = meta(maps, side, side, width, dtype=dtype)
    weight, bias = meta(width, 1, kernel, kernel, dtype=stat), meta(width, dtype=stat)
    k.depthwise_conv_normalize(x, weight, bias, table, (None, None), 1e-6)
    k.depthwise_conv_forward(x, weight, None, x, table, True)
    k.depthwise_conv_backward_weight(x, x, table, kernel)


def layer_norm_grn(x: torch.Tensor, gain: torch.Tensor, images: Segments) -> None:
    both = NormParams(gain, gain)
    y, *statistics = k.layer_norm_grn_forward(x, both, gain, gain, images, 1e-6, 1e-6)
    k.layer_norm_grn_backward(y, x, tuple(statistics), both, gain, images, 1e-6)


def rows(width: int, dtype: torch.dtype) -> None:
    """Norms, GRN, and copies."""
    stat = F64 if dtype == F64 else F32
    x, gain = meta(64, 8, 8, width, dtype=dtype), meta(width, dtype=stat)
    y, mean, rstd = k.layer_norm_forward(x, gain, gain, 1e-6)
    k.layer_norm_backward(y, x, mean, rstd, gain)
    k.normalized_backward(y, x, rstd, gain)
    z, rstd = k.space_to_depth_normalize(x, gain, gain, 1e-6)
    k.space_to_depth_normalize_backward(z, z, rstd, gain)
    images = Segments(None, 1, 64)
    _, norm = k.grn_forward(x, gain, gain, images, True, 1e-6)
    k.grn_backward(x, x, gain, norm, images, True, 1e-6)
    layer_norm_grn(x, gain, images)
    k.column_sum(x.view(-1, width))
    slots = meta(19 * 64, dtype=torch.int32)
    packed = k.gather_patches(meta(64, 56, 56, width, dtype=dtype), slots, (7, 7))
    k.scatter_patches(packed, meta(64, 49, dtype=torch.int32), (7, 7), meta(width, dtype=dtype))
    k.patch_pixels(meta(64, 3, 224, 224, dtype=dtype), slots, (7, 7))
    places, dense = Places(slots, (7, 7), 8), meta(64, 56, 56, width, dtype=dtype)
    z, rstd = k.gather_normalize(dense, places, RowNorm(gain, gain, 1e-6))
    k.normalized_backward_put(z, z, rstd, None, places, dense)
    k.put_patches(z, places, dense)


def everything() -> None:
    """What a model's training step launches: tiny's stages, and other sizes where their tiles differ."""
    for each, width in ((1216, 96), (304, 192), (76, 384), (19, 768), (1216, 40), (1216, 128)):
        mlp(64, each, width, BF16)
    mlp(64, 1216, 96, BF16, keep=False)
    mlp(64, 19, 384, BF16)
    for each, width in ((1216, 96), (304, 192), (76, 384)):
        mlp(64, each, width, F16)
        mlp(64, each, width, BF16, act="gelu_tanh")
    mlp(8, 1216, 96, BF16, ragged=True)
    mlp(8, 1216, 96, BF16, batch=True)
    tuned(64, 1216, 96, BF16)
    for side, width in ((8, 96), (4, 192), (2, 384), (1, 768)):
        spatial(side, width, BF16)
    for side, width in ((8, 96), (1, 768)):
        gathered(19, side, width, BF16, norm=True)
        gathered(19, side, width, BF16, norm=False)
    spatial(56, 96, BF16, packed=False)
    rows(96, BF16)
    wide, gain = meta(64, 9000, dtype=BF16), meta(9000)
    k.layer_norm_backward(wide, *k.layer_norm_forward(wide, gain, gain, 1e-6), gain)
    layer_norm_grn(wide, gain, Segments(None, 1, 64))
    for width in (384, 768, 2816):
        layer_norm_grn(meta(1216, width, dtype=BF16), meta(width), Segments(None, 1, 64))
    layer_norm_grn(meta(19 * 64, 64, 96, dtype=BF16), meta(96), Segments(meta(65, dtype=torch.int32), 64, 64))


def other_dtypes() -> None:
    """The same kernels for float16, float32 and float64, and for shapes of one: constants when compiled."""
    for dtype in (F16, F32, F64):
        mlp(64, 304, 96, dtype)
        spatial(8, 96, dtype)
        rows(96, dtype)
        gathered(19, 8, 96, dtype, norm=dtype != F32)
    spatial(8, 96, BF16, kernel=11)
    mlp(1, 1, 1, BF16)
    spatial(1, 1, F32, packed=False)
    rows(1, F32)


def launches(family: str, run=everything) -> list[Launch]:
    """What is launched on a GPU of a family, each compilation once."""
    with plans.assumed_family(family), recorded_launches() as recorded:
        run()
    return list({key(launch): launch for launch in recorded}.values())


def _described(launch: Launch) -> Iterator[tuple[str, str, object, bool]]:
    """``(name, type, constant, divisible by 16)`` of each argument, as Triton specialises it when it launches."""
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not plain):
            yield parameter.name, "constexpr", value, False
        elif isinstance(value, torch.Tensor):
            yield parameter.name, _POINTERS[value.dtype], None, True
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            yield parameter.name, kind, None, value % 16 == 0 and not plain


def key(launch: Launch) -> tuple:
    return launch.kernel.__name__, tuple(_described(launch)), launch.num_warps, launch.num_stages


def source(launch: Launch) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, (name, kind, constant, aligned) in enumerate(_described(launch)):
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = constant
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def measure(launch: Launch, target: str) -> dict:
    """Compiles a launch; ``{kernel, target, registers, shared, spills, float64}``, in bytes."""
    compiled = triton.compile(source(launch), target=TARGETS[target], options=launch.options)
    read = _amd if target.startswith("gfx") else _nvidia
    registers, spills = read(compiled)
    return {
        "kernel": launch.kernel.__name__,
        "target": target,
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": spills,
        "float64": "*fp64" in [kind for _, kind, *_ in _described(launch)],
    }


def _nvidia(compiled) -> tuple[int, int]:
    """Registers and stack bytes of a kernel: our kernels have no arrays, so a stack is spilled registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def _amd(compiled) -> tuple[int, int]:
    """Vector registers and spilled ones."""
    text = compiled.asm["amdgcn"]
    return tuple(int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))


def _measure_all_of(job: tuple[str, str, int, int]) -> list[dict]:
    """Every n-th launch of a family; a process of the pool records the launches itself, as kernels do not travel."""
    target, run, start, step = job
    return [measure(launch, target) for launch in launches(target, globals()[run])[start::step]]


def measure_all(targets: Iterable[str] = TARGETS, workers: int | None = None) -> list[dict]:
    """All kernels on all targets; the other dtypes on sm_90 only, where they are the same code but for types."""
    workers = workers or os.cpu_count() or 1
    jobs = [(target, "everything", i, workers) for target in targets for i in range(workers)]
    if "sm_90" in targets:
        jobs += [("sm_90", "other_dtypes", i, workers) for i in range(workers)]
    with ProcessPoolExecutor(workers) as pool:
        return [row for part in pool.map(_measure_all_of, jobs) for row in part]


def summary(measured: list[dict]) -> dict:
    """By kernel the largest figures, those of float64 apart; what is committed."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in measured:
        groups[row["kernel"]].append(row)

    def most(members: list[dict], field: str) -> dict[str, int]:
        return {t: max((m[field] for m in members if m["target"] == t), default=0) for t in TARGETS}

    kernels = {}
    for name, members in sorted(groups.items()):
        narrow, wide = ([m for m in members if m["float64"] == is_wide] for is_wide in (False, True))
        kernels[name] = {"count": len(members)} | {f: most(narrow, f) for f in ("registers", "shared", "spills")}
        if wide:
            kernels[name]["float64"] = {f: max(m[f] for m in wide) for f in ("registers", "shared", "spills")}
    return {"triton": importlib.metadata.version("triton"), "targets": list(TARGETS), "kernels": kernels}


def table(report: dict) -> str:
    lines = [f"{'kernel':<36}{'compiled':>9}" + "".join(f"{t:>9}" for t in TARGETS) + f"{'shared':>9}{'spills':>8}"]
    for name, row in report["kernels"].items():
        registers = "".join(f"{row['registers'][t]:>9}" for t in TARGETS)
        spills = sum(row["spills"].values())
        lines.append(f"{name:<36}{row['count']:>9}{registers}{max(row['shared'].values()):>9}{spills:>8}")
    return "\n".join(lines)


def spills(report: dict) -> bool:
    """Whether any kernel spills registers."""
    return any(sum(row["spills"].values()) for row in report["kernels"].values())


def write(report: dict) -> None:
    """Write the committed result."""
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
