"""``tune``: measures on this machine which matrix products of the MLP Triton should fuse, and keeps the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .. import backends
from ..backends import triton
from ..layout import num_kept
from ..models.config import get_config

PATCH = 32
STEM = 4
DECODER = 512  # width of FCMAE's decoder


def mlp_shapes(
    models: Iterable[str], image_size: tuple[int, int], mask_ratio: float | None, dtype: torch.dtype
) -> list:
    """Shapes of the MLPs of models, stage by stage, without repetition.

    ``mask_ratio`` as in pre-training, where image sides are multiples of 32, with the decoder's MLP over all patches;
    None for dense training."""
    from ..backends.triton.plans import Shape

    height, width = image_size
    found: dict[Shape, None] = {}
    for model in models:
        for stage, channels in enumerate(get_config(model).dims):
            stride = STEM << stage
            rows = (height // stride) * (width // stride)
            if mask_ratio is not None:
                rows = num_kept((height // PATCH, width // PATCH), mask_ratio) * (PATCH // stride) ** 2
            found[Shape(dtype, channels, 4 * channels, channels, rows)] = None
    if mask_ratio is not None:
        found[Shape(dtype, DECODER, 4 * DECODER, DECODER, (height // PATCH) * (width // PATCH))] = None
    return list(found)


def unavailable() -> str | None:
    """Why nothing can be tuned here, or None."""
    if not triton.INTERPRETED and not torch.cuda.is_available():
        return "tune needs a GPU, and PyTorch sees none on this machine"
    return backends.unsupported_reason("triton", triton.DEVICE, torch.float32)


def tune(shapes: Sequence, images: int, say: Callable[[str], None] = print, keep: bool = True, **options) -> dict:
    """Measures shapes with so many images, and writes their plans, to serve any number of them, if ``keep``;
    ``{shape: Finding}``.

    ``options`` go to ``backends.triton.tune.find``. Raises RuntimeError where Triton cannot run."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    from ..backends.triton import plans
    from ..backends.triton.tune import find

    serving = backends.automatic(triton.DEVICE, (shapes[0].dtype,)) if shapes else "triton"
    backend = backends.get("triton" if triton.INTERPRETED else serving)
    findings = {}
    for shape in shapes:
        findings[shape] = find(shape, images, backend, triton.DEVICE, **options)
        say(describe(shape, images, findings[shape]))
    if keep and findings:
        say(f"written to {plans.write({shape: finding.plan for shape, finding in findings.items()})}")
    return findings


def describe(shape, images: int, finding) -> str:
    """One line for people: the shape, microseconds of each way forward and backward, and what was chosen."""

    def ways(times: dict[str, float], chosen: str) -> str:
        return ", ".join(f"{'*' if way == chosen else ''}{way} {1e6 * t:.0f} us" for way, t in times.items())

    plan = finding.plan
    forward = "fused" if plan.forward_fused else "library"
    backward = "fused" if plan.backward_fused else "weight" if plan.weight else "library"
    return (
        f"C = {shape.width:<5} {images} images of {shape.rows_each:<5} rows   forward: "
        f"{ways(finding.forward, forward)};  backward: {ways(finding.backward, backward)}"
    )
