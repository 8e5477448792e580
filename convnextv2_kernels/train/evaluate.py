"""Top-1 and top-5 of a classifier on held-out images, over all processes."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data.labelled import NO_LABEL, EvalDataset, LabelledSample, collate_labelled
from .distributed import World
from .metrics import TopK
from .signals import ignore_signals


class _Part(Dataset):
    """The images of one process: every ``size``-th, filled up by images without a label so that all have as many, as
    sharded models need."""

    def __init__(self, dataset: EvalDataset, world: World):
        self.dataset, self.world = dataset, world

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world.size)

    def __getitem__(self, index: int) -> LabelledSample:
        place = index * self.world.size + self.world.rank
        if place < len(self.dataset):
            return self.dataset[place]
        return LabelledSample(self.dataset[0].image, NO_LABEL, [])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: EvalDataset,
    batch_size: int,
    world: World | None = None,
    workers: int = 0,
    precision: str = "float32",
    note: Callable[[str], None] = print,
) -> dict[str, float]:
    """Return ``{"top1", "top5"`` in percent, ``"loss", "images"}`` of a classifier on ``dataset``, the same in all
    processes; all must call it. Images that cannot be read are named and left out."""
    world = world or World()
    parameter = next(model.parameters())
    device = parameter.device
    loader = DataLoader(
        _Part(dataset, World(world.rank, world.size)),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate_labelled,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
    )
    counter, failures, training = TopK(), [], model.training
    model.eval()
    try:
        for batch in loader:
            failures += batch.failures
            images = batch.images.to(device, parameter.dtype)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(images)
            counter.update(logits, batch.labels.to(device))
    finally:
        model.train(training)
    total = world.gather(counter.counts().tolist()).sum(0)
    for name, reason in (f for part in world.gather_objects(failures) for f in part):
        note(f"warning: {name} cannot be read ({reason}); it is left out of the evaluation")
    return TopK().merge(total).result()
