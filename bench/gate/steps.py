"""Training steps of whole models: FCMAE, the dense classifier, and a foreign model after ``fuse``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convnextv2_kernels as ck
from convnextv2_kernels.benchmark.variants import make_batch, make_sparse
from convnextv2_kernels.settings import override

from .trace import kept, measured

BATCH = 2
IMG_SIZE = 224
CLASSES = 10
POLICIES = ("inputs", "hidden")
# Left out where oneDNN convolves: the scratch memory it asks of PyTorch's allocator depends on the instruction set.
BY_PROCESSOR = ("peak_bytes", "allocated_bytes")
# large and huge are left out: their weights and gradients alone take 1.6 and 5.3 GB and seconds to draw, and they are
# deeper and wider copies of base.
SIZES = ("atto", "femto", "pico", "nano", "tiny", "base")


def measure_fcmae(size: str) -> dict[str, dict[str, int]]:
    """The FCMAE step of a size on the cpu backend, by what is kept for backward, and on the reference.

    Of the reference only the bytes saved for backward: it convolves by oneDNN, see ``BY_PROCESSOR``.
    """
    model = f"convnextv2_{size}"
    batch, variant = make_batch(BATCH, IMG_SIZE, seed=0), make_sparse(model, seed=0)
    alive = [*variant.model.parameters(), *variant.model.buffers(), batch.images, batch.mask]

    def forward() -> Tensor:
        return variant.forward(batch)[0]

    results = {}
    with ck.use_backend("cpu"):
        for policy in POLICIES:
            with override(save=policy):
                results[f"{model} cpu save={policy}"] = measured(forward, alive)
    with ck.use_backend("reference"):
        results[f"{model} reference"] = kept(forward, alive)
    return results


def measure_dense(size: str) -> dict[str, dict[str, int]]:
    """The classifier's step, all pixels visible: our own model, and the official one after ``fuse``."""
    name = f"convnextv2_{size}"
    torch.manual_seed(0)
    results = {}
    with ck.use_backend("cpu"):
        own = ck.models.create_model(name, num_classes=CLASSES)
        results[f"classifier {name} cpu"] = _classify(own)
        for policy in POLICIES:
            foreign = _official(name)
            report = ck.fuse(foreign, save=policy)
            if report.skipped or not report.replaced:
                raise RuntimeError(f"fuse left blocks of the official {name} alone:\n{report}")
            counted = _classify(foreign)
            # its stem and downsampling stay oneDNN's convolutions
            results[f"fused official {name} cpu save={policy}"] = {
                key: value for key, value in counted.items() if key not in BY_PROCESSOR
            }
    return results


def _official(name: str) -> nn.Module:
    from helpers.official import OfficialConvNeXtV2

    config = ck.models.get_config(name)
    return OfficialConvNeXtV2(config.depths, config.dims, CLASSES)


def _classify(model: nn.Module) -> dict[str, int]:
    images, labels = torch.randn(BATCH, 3, IMG_SIZE, IMG_SIZE), torch.arange(BATCH) % CLASSES
    alive = [*model.parameters(), *model.buffers(), images, labels]

    def forward() -> Tensor:
        return F.cross_entropy(model(images), labels)

    return measured(forward, alive)


def measure(sizes: Sequence[str], log: Callable[[str], None] = lambda text: None) -> dict[str, dict[str, int]]:
    """All steps: FCMAE of the sizes, the classifiers of the first one."""
    results = {}
    for size in sizes:
        log(f"FCMAE step of {size}")
        results.update(measure_fcmae(size))
    log(f"classifiers of {sizes[0]}")
    return {**results, **measure_dense(sizes[0])}
