"""Features of a frozen encoder for a labelled dataset."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.labelled import NO_LABEL, collate_labelled
from ..models import ConvNeXtV2
from ..train.signals import ignore_signals

POOLS = ("mean", "norm")


@torch.no_grad()
def extract_features(
    model: ConvNeXtV2,
    data: Dataset | DataLoader,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    advance: Callable[[int], None] | None = None,
    pool: str = "mean",
    amp_dtype: torch.dtype | None = None,
    failures: list[tuple[str, str]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (features float32 ``[N, D]``, labels int64 ``[N]``) on the CPU, in the data's order.

    Args:
        model: moved to ``device`` and evaluated; its head is not used, its training mode is put back.
        data: a :class:`.labelled.EvalDataset`, or a loader of :class:`.labelled.LabelledBatch`, of which
            ``batch_size`` and ``workers`` are then not asked.
        advance: told how many images are done.
        pool: "mean" averages the last stage over its sites; "norm" normalises that by the classifier's ``norm``,
            which pre-training does not train.
        amp_dtype: dtype of autocast; None for float32.
        failures: takes (name, reason) of images that could not be read. They are left out: N is smaller by them.

    Raises:
        ValueError: ``pool`` is neither, or no image could be read.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be 'mean' or 'norm', got {pool!r}")
    device = torch.device(device)
    loader = data if isinstance(data, DataLoader) else _loader(data, batch_size, workers, device)
    was_training = model.training
    model.to(device).eval()
    found, labels, done = [], [], 0
    try:
        for batch in loader:
            if failures is not None:
                failures.extend(batch.failures)
            done += len(batch.labels)
            keep = batch.labels != NO_LABEL
            if batch.images is not None and keep.any():
                images = batch.images[keep].to(device, non_blocking=True)
                with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                    pooled = model.forward_features(images) if pool == "norm" else model.run_stages(images).mean((1, 2))
                found.append(pooled.float().cpu())
                labels.append(batch.labels[keep])
            if advance is not None:
                advance(done)
    finally:
        model.train(was_training)
    if not found:
        raise ValueError(f"data must hold a readable image, got none in {done}")
    return torch.cat(found), torch.cat(labels)


def _loader(dataset: Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate_labelled,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # keeps the loader from drawing its seed from the global stream
    )
