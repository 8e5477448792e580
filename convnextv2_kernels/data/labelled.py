"""Labelled images as a dataset: for training, addressed by (epoch, index), and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import describe_error
from .augment import seeded_globals
from .decoding import PLAIN, Decoding, open_rgb, to_rgb
from .images import MAX_SUBSTITUTES, Source
from .rng import AUGMENT

NO_LABEL = -1  # of an image that could not be read; losses and metrics of an evaluation leave it out
Transform = Callable[[Image.Image], torch.Tensor]


@dataclass
class LabelledSample:
    """One image, float32 [3, H, W] or None where nothing could be read, its label, and the failures met."""

    image: torch.Tensor | None
    label: int
    failures: list[tuple[str, str]]


@dataclass
class LabelledBatch:
    """Images as float32 [N, 3, H, W] (None: the data is gone), labels as int64 [N], the failures met, (name, reason).

    A label of -1 belongs to an image that could not be read.
    """

    images: torch.Tensor | None
    labels: torch.Tensor
    failures: list[tuple[str, str]]

    def pin_memory(self) -> LabelledBatch:
        """Move images and labels to page-locked memory (called by the DataLoader)."""
        if self.images is not None:
            self.images = self.images.pin_memory()
        self.labels = self.labels.pin_memory()
        return self


class _Labelled(Dataset):
    def __init__(
        self, sources: Sequence[Source], labels: Sequence[int], transform: Transform, decoding: Decoding = PLAIN
    ):
        if len(sources) != len(labels):
            raise ValueError(f"labels must be one for each source, got {len(labels)} for {len(sources)} sources")
        self.sources, self.labels = list(sources), [int(label) for label in labels]
        self.transform, self.decoding = transform, decoding

    def __len__(self) -> int:
        return len(self.sources)

    def _open(self, index: int, failures: list[tuple[str, str]]) -> Image.Image | None:
        source = self.sources[index]
        try:
            decode = to_rgb if isinstance(source, Image.Image) else open_rgb
            image = decode(source, self.decoding)
            if min(image.size) > 0:
                return image
            failures.append((str(source), "the image has no pixels"))
        except Exception as error:  # Pillow's decoders raise whatever a broken file trips.
            failures.append((str(source), describe_error(error)))
        return None


class LabelledDataset(_Labelled):
    """Augmented images of ``sources`` (paths or decoded images) with their labels, addressed by (epoch, index).

    A sample is a pure function of (seed, epoch, index): the streams ``transform`` draws from are seeded around it. A
    source that cannot be read is replaced by the next one that can, with that one's own label, and the failure travels
    with the sample: a file that breaks in the middle of a run must not end it.

    Raises:
        ValueError: another number of labels than of sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Sequence[int],
        transform: Transform,
        seed: int,
        decoding: Decoding = PLAIN,
    ):
        super().__init__(sources, labels, transform, decoding)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> LabelledSample:
        epoch, index = key
        failures: list[tuple[str, str]] = []
        for offset in range(min(len(self.sources), MAX_SUBSTITUTES)):
            place = (index + offset) % len(self.sources)
            image = self._open(place, failures)
            if image is not None:
                with seeded_globals(self.seed, AUGMENT, epoch, index):
                    return LabelledSample(self.transform(image), self.labels[place], failures)
        return LabelledSample(None, NO_LABEL, failures)


class EvalDataset(_Labelled):
    """Images of ``sources`` (paths or decoded images) with their labels, addressed by index, for evaluation.

    ``transform`` must draw nothing. A source that cannot be read is an image of zeros with label -1, which metrics
    leave out, and the failure travels with it.

    Raises:
        ValueError: another number of labels than of sources.
    """

    def __getitem__(self, index: int) -> LabelledSample:
        failures: list[tuple[str, str]] = []
        image = self._open(index, failures)
        if image is None:
            blank = torch.zeros_like(self.transform(Image.new("RGB", (64, 64))))
            return LabelledSample(blank, NO_LABEL, failures)
        return LabelledSample(self.transform(image), self.labels[index], failures)


def collate_labelled(samples: list[LabelledSample]) -> LabelledBatch:
    """Stack samples to a batch; without images where one of them has none."""
    failures = [failure for sample in samples for failure in sample.failures]
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    if any(sample.image is None for sample in samples):
        return LabelledBatch(None, labels, failures)
    return LabelledBatch(torch.stack([sample.image for sample in samples]), labels, failures)
