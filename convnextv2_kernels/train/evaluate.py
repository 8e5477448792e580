"""Top-1 and top-5 of a classifier on held-out images, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .._console import visible
from ..data.labelled import NO_LABEL, EvalDataset, LabelledBatch, LabelledSample, collate_labelled
from ..errors import UserError
from .distributed import World
from .loading import Loader, LoaderError, Loading
from .signals import Stopped


class TopK:
    """Count correct predictions and sum the cross entropy over batches; labels of -1 are left out.

    A k beyond the number of classes counts as that number. Nothing is read back from the device before
    :meth:`result`.

    Raises:
        ValueError: ``ks`` is empty or holds a number below 1.
    """

    def __init__(self, ks: Sequence[int] = (1, 5)):
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be numbers of at least 1, got {tuple(ks)}")
        self.ks = tuple(ks)
        self._counts = torch.zeros(len(self.ks) + 2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in ``logits [N, K]`` of any floating-point dtype and ``labels`` int64 ``[N]``."""
        counted = labels != NO_LABEL
        losses = F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="none")
        classes = logits.shape[1]
        best = logits.topk(min(max(self.ks), classes), dim=1).indices
        hits = best == labels[:, None]  # never where the label is -1
        sums = [hits[:, : min(k, classes)].sum() for k in self.ks] + [losses.double().sum(), counted.sum()]
        self._counts = self._counts.to(logits.device) + torch.stack([value.double() for value in sums])

    def counts(self) -> Tensor:
        """Return float64 ``[len(ks) + 2]``: correct for each k, sum of the losses, images. Processes add these up."""
        return self._counts.clone()

    def merge(self, counts: Tensor) -> TopK:
        """Add the counts of others to one's own; return self."""
        if counts.shape != self._counts.shape:
            raise ValueError(f"counts must have shape {tuple(self._counts.shape)}, got {tuple(counts.shape)}")
        self._counts = self._counts.to(counts.device) + counts.double()
        return self

    def result(self) -> dict[str, float]:
        """Return ``{"top1": percent, ..., "loss": mean, "images": number}``; NaN where no image was counted."""
        *correct, loss, images = self._counts.tolist()
        share = [value / images if images else float("nan") for value in (*correct, loss)]
        percents = {f"top{k}": 100 * value for k, value in zip(self.ks, share, strict=False)}
        return {**percents, "loss": share[-1], "images": int(images)}


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
    loading: Loading | None = None,
    precision: str = "float32",
    note: Callable[[str], None] = print,
    signum: Callable[[], int | None] = lambda: None,
) -> dict[str, float]:
    """Return ``{"top1", "top5"`` in percent, ``"loss", "images"}`` of a classifier on ``dataset``, the same in all
    processes; all must call it. Images that cannot be read are named and left out.

    ``signum`` returns a signal to stop where one came. Raises :class:`.signals.Stopped` where it does in some process,
    and UserError where no image can be read, or loaders of images die or stay silent.
    """
    world = world or World()
    parameter = next(model.parameters())
    device = parameter.device
    part = _Part(dataset, World(world.rank, world.size))
    counter, failures, training = TopK(), [], model.training
    model.eval()
    try:
        for batch in _batches(
            Loader(part, collate_labelled, loading or Loading(), batch_size=batch_size), world, signum
        ):
            failures += batch.failures
            images = batch.images.to(device, parameter.dtype)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(images)
            counter.update(logits, batch.labels.to(device))
    finally:
        model.train(training)
    total = world.gather(counter.counts().tolist()).sum(0)
    lost = [failure for part in world.gather_objects(failures) for failure in part]
    result = TopK().merge(total).result()
    if not result["images"]:
        first = f" (the first: {visible(lost[0][0])}, {visible(lost[0][1])})" if lost else ""
        raise UserError(f"none of the {len(dataset)} images to evaluate on can be read{first}.")
    for name, reason in lost:
        note(f"warning: {name} cannot be read ({reason}); it is left out of the evaluation")
    return result


def _batches(loader: Loader, world: World, signum: Callable[[], int | None]) -> Iterator[LabelledBatch]:
    """This process's batches, as long as no process was told to stop or lost its loaders."""
    with loader:
        for _ in range(len(loader)):
            batch = failure = None
            try:
                batch = loader.next(lambda: bool(signum()))
            except LoaderError as error:
                failure = str(error)
            signums, failed = world.gather([signum() or 0, failure is not None]).T
            if failed.any():
                raise UserError(f"evaluation: {next(filter(None, world.gather_objects(failure)))}.")
            if signums.any():
                raise Stopped(int(signums.max()))
            yield batch
