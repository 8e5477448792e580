"""What ``convnextv2_kernels.tune`` finds on this GPU, to update the committed plans from."""

from __future__ import annotations

import functools

from convnextv2_kernels.benchmark.machine import free_memory

from .cases import DRY_STAGES, stage_shapes
from .results import Recorder
from .setting import Setting
from .triton_kernels import shape_of
from .triton_products import Tiles
from .triton_setup import compile_ahead, feature_dtype, require

PLAN = (("tiny", 256), ("atto", 256))


def find(shape, images: int, setting: Setting) -> dict:
    """The tiles that won for a shape, those of the committed plan, and microseconds of each way."""
    from convnextv2_kernels.backends.triton import DEVICE, tune
    from convnextv2_kernels.backends.triton.plans import KERNELS
    from convnextv2_kernels.cli.tune import tune as measure

    tiles, more = Tiles.of(shape), {}
    if setting.dry_run:
        more = {"repetitions": 1, "candidates": {name: (tile,) for name, tile in tiles.all.items()}}
    else:
        case = tune.Case(shape, images, DEVICE)
        calls = (case.kernel(name, tile) for name in KERNELS for tile in tune.CANDIDATES[name])
        compile_ahead(filter(None, calls))
        del case
    finding = measure([shape], images, say=lambda text: None, save=False, **more)[shape]
    return {
        "won": _named(finding.plan, KERNELS),
        "committed": _named(tiles.plan, KERNELS),
        "forward_us": {way: 1e6 * seconds for way, seconds in finding.forward.items()},
        "backward_us": {way: 1e6 * seconds for way, seconds in finding.backward.items()},
    }


def _named(plan, names) -> dict[str, list[int]]:
    return {name: list(tile) for name in names if (tile := getattr(plan, name)) is not None}


def run(setting: Setting, recorder: Recorder) -> None:
    require(setting)
    recorder.put(
        about="by shape of the MLP: won and committed: rows, columns, depth, warps, stages of the tiles of each fused "
        "kernel, the library's products where there is none; us of the whole forward and backward by each way"
    )
    stages = DRY_STAGES[:1] if setting.dry_run else [shape for plan in PLAN for shape in stage_shapes(*plan)]
    for stage in stages:
        shape = shape_of(stage, feature_dtype(setting))
        needs = 1 if setting.dry_run else 15
        work = functools.partial(find, shape, stage.images, setting)
        recorder.case("shapes", stage.label, work, needs=needs, limit=90)
        free_memory(setting.device)
