"""Every public op, forward and backward, against the float64 reference: what is broken shows in the first minute."""

from __future__ import annotations

from .results import Recorder
from .setting import Setting

SPATIAL = ("submanifold_depthwise_conv2d", "depthwise_conv_layer_norm", "convnextv2_block")
# shapes that take other kernels than the small samples: each patch side of a model, a dense map
PLACES = (("uniform", 8), ("uniform", 4), ("uniform", 2), ("uniform", 1), ("ragged", 8), ("dense_28x30", None))


def cases(dry_run: bool) -> list[tuple[str, dict]]:
    """Ops with the axes of their samples."""
    from conformance.samples import SPECS

    plain = [(op, {}) for op in SPECS]
    places = PLACES[3:4] if dry_run else PLACES
    wide = [(op, {"at": at, "c": 40, "k": 7}) for at in places for op in SPATIAL]
    return plain + wide


def run(setting: Setting, recorder: Recorder) -> None:
    import torch
    from conformance.samples import make_sample
    from conformance.tolerance import check

    torch.set_num_threads(1 if setting.dry_run else 8)
    dtypes = [torch.float32, torch.bfloat16] if setting.dry_run else []
    dtypes = dtypes or [torch.bfloat16, torch.float32, torch.float16, torch.float64]

    def one(op: str, axes: dict, dtype: torch.dtype) -> str:
        check(make_sample(op, **axes), setting.backend, dtype, setting.device)
        return "ok"

    for dtype in dtypes:
        for op, axes in cases(setting.dry_run):
            where = " ".join(str(part) for part in axes.get("at", ("small",)) if part is not None)
            key = f"{op} {where} {str(dtype).removeprefix('torch.')}"
            recorder.case("checks", key, lambda op=op, axes=axes, dtype=dtype: one(op, axes, dtype))
