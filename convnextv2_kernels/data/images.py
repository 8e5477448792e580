"""Images to training crops: RandomResizedCrop, flip, batches, normalisation.

The augmentation is that of the official FCMAE pre-training: RandomResizedCrop with scale (0.2, 1)
and bicubic interpolation, horizontal flip, ImageNet mean and standard deviation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..errors import describe_error
from .decoding import PLAIN, Decoding, decoded, opened
from .rng import AUGMENT, ORDER, numpy_stream

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXIF_ORIENTATION = 0x0112
# Images in a row that may fail before the data counts as gone.
MAX_SUBSTITUTES = 20

Box = tuple[float, float, float, float]
Source = Path | Image.Image


def random_resized_crop_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    aspect: float = 1.0,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw the (left, upper, right, lower) of a RandomResizedCrop of an image of (width, height).

    The crop's area is a uniform share of the image's and its width / height is log-uniform in
    ``ratio`` times ``aspect``, the width / height of the output (so that a non-square output is
    distorted no more than a square one). After ten draws that do not fit: the largest centred
    crop within the allowed ratios.
    """
    width, height = size
    low, high = ratio[0] * aspect, ratio[1] * aspect
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < low:
        h = max(1, round(width / low))
    elif width / height > high:
        w = max(1, round(height * high))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(size: tuple[int, int], aspect: float) -> Box:
    """Return the largest centred box of width / height ``aspect`` in a (width, height)."""
    width, height = size
    w, h = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def load_crop(
    source: Source,
    size: tuple[int, int],
    rng: np.random.Generator | None,
    hflip: float = 0.5,
    decoding: Decoding = PLAIN,
) -> torch.Tensor:
    """Return one crop of ``source`` as uint8 [H, W, 3], with ``size`` = (H, W).

    With a generator: a random resized crop, flipped with probability ``hflip``. Without: the largest centred
    crop. ``source`` is a path, which is decoded as ``decoding`` says, or a decoded RGB image.
    """
    crop = _crop(source, size, rng) if isinstance(source, Image.Image) else _decode_crop(source, size, rng, decoding)
    if rng is not None and rng.random() < hflip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(crop))


def _draw_box(image_size: tuple[int, int], size: tuple[int, int], rng: np.random.Generator | None) -> Box:
    aspect = size[1] / size[0]
    if rng is None:
        return centre_box(image_size, aspect)
    return random_resized_crop_box(image_size, rng, aspect)


def _crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator | None) -> Image.Image:
    left, top, right, bottom = _draw_box(image.size, size, rng)
    box = left, top, min(right, image.width), min(bottom, image.height)  # a centred box is rounded
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def _decode_crop(path: Path, size: tuple[int, int], rng: np.random.Generator | None, decoding: Decoding) -> Image.Image:
    height, width = size
    with opened(path, decoding.max_pixels) as image:
        if image.format not in ("JPEG", "MPO"):
            return _crop(decoded(image, decoding), size, rng)
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        full = (image.height, image.width) if turned else image.size
        box = _draw_box(full, size, rng)
        # A JPEG decoder can halve the image on the way, several times faster. Two source pixels
        # per output pixel are kept, so that the bicubic filter still decides what is seen.
        shrink = min((box[2] - box[0]) / (2 * width), (box[3] - box[1]) / (2 * height))
        if shrink >= 2:
            image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        upright = decoded(image, decoding)
        x, y = upright.width / full[0], upright.height / full[1]
        scaled = (box[0] * x, box[1] * y, min(box[2] * x, upright.width), min(box[3] * y, upright.height))
        return upright.resize((width, height), Image.Resampling.BICUBIC, box=scaled)


@dataclass
class Sample:
    """One crop, uint8 [H, W, 3] or None where nothing could be read, and the failures met."""

    image: torch.Tensor | None
    failures: list[tuple[str, str]]


@dataclass
class Batch:
    """Crops as uint8 [N, H, W, 3] (None: the data is gone) and the failures met, (name, reason)."""

    images: torch.Tensor | None
    failures: list[tuple[str, str]]

    def pin_memory(self) -> "Batch":
        """Move the pixels to page-locked memory (called by the DataLoader)."""
        if self.images is not None:
            self.images = self.images.pin_memory()
        return self


class CropDataset(Dataset):
    """Random crops of ``sources``, addressed by (epoch, index).

    A crop is a pure function of (seed, epoch, index). A source that cannot be read is replaced by
    the next one that can, and the failure travels with the sample: a file that breaks in the middle
    of a run must not end it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        size: tuple[int, int],
        seed: int,
        hflip: float = 0.5,
        decoding: Decoding = PLAIN,
    ):
        self.sources = list(sources)
        self.size, self.seed, self.hflip, self.decoding = size, seed, hflip, decoding

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        failures = []
        for offset in range(min(len(self.sources), MAX_SUBSTITUTES)):
            source = self.sources[(index + offset) % len(self.sources)]
            rng = numpy_stream(self.seed, AUGMENT, epoch, index)
            try:
                return Sample(load_crop(source, self.size, rng, self.hflip, self.decoding), failures)
            except Exception as error:  # Pillow's decoders raise whatever a broken file trips.
                failures.append((str(source), describe_error(error)))
        return Sample(None, failures)


class RepeatedCrops(CropDataset):
    """``length`` crops an epoch from a few sources, taken in turn."""

    def __init__(self, sources: Sequence[Source], size: tuple[int, int], seed: int, length: int):
        super().__init__(sources, size, seed)
        self.length = length

    def __len__(self) -> int:
        return self.length


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) lists of steps ``start`` to ``stop`` of a run, or of one process's part of them.

    Each epoch visits the images in its own order, a pure function of (seed, epoch); what does not
    fill a batch at an epoch's end is left out. ``part`` (begin, end) are the images of each batch that are wanted.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, start: int, stop: int, part: tuple[int, int] | None = None
    ):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start, self.stop = start, stop
        self.part = (0, batch_size) if part is None else part

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order = numpy_stream(self.seed, ORDER, epoch).permutation(self.num_images)
                order_epoch = epoch
            first = position * self.batch_size
            begin, end = self.part
            yield [(epoch, int(i)) for i in order[first + begin : first + end]]


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch."""
    failures = [failure for sample in samples for failure in sample.failures]
    if any(sample.image is None for sample in samples):
        return Batch(None, failures)
    return Batch(torch.stack([sample.image for sample in samples]), failures)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Turn uint8 [N, H, W, 3] into float32 [N, 3, H, W] with ImageNet mean 0 and deviation 1."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device)
    std = torch.tensor(IMAGENET_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """Invert :func:`normalize` up to the scale: [N, 3, H, W] to float32 [N, H, W, 3] in 0..1."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)
    std = torch.tensor(IMAGENET_STD, device=images.device)
    return images.permute(0, 2, 3, 1).float() * std + mean
