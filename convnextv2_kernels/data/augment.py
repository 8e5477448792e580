"""The image transforms of the official fine-tuning: timm's for training, a resize and a centre crop for evaluation.

Source: ``datasets.py`` of the official repository, without its special case for outputs of 32 px and less. Both make a
float32 [3, H, W], normalised by ImageNet's mean and standard deviation, of an RGB Pillow image. Sizes are (H, W).

timm is imported when it is first needed, and by :func:`timm` alone: nothing else in this package may import timm or
torchvision, but for the layers of timm that ablations take (``nn/hidden_layers.py``).
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import UserError, describe_error
from .images import IMAGENET_MEAN, IMAGENET_STD, normalize
from .rng import numpy_stream

DEFAULT_CROP_PCT = 224 / 256
WARP_SIDE = 384  # from here on the official evaluation warps the whole image to the output
LONGEST = 8.0  # an image is cut to this many times its output's aspect before it is resized
INTERPOLATIONS = ("bicubic", "bilinear", "random")
ERASE_MODES = ("const", "rand", "pixel")


@contextmanager
def seeded_globals(seed: int, purpose: int, *counters: int) -> Iterator[None]:
    """Seed the global streams of ``random``, NumPy and PyTorch's CPU generator, from which timm's augmentation draws,
    by (seed, purpose, counters); put them back afterwards. CUDA's generators are not touched."""
    stream = numpy_stream(seed, purpose, *counters)
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(int(stream.integers(2**63)))
        np.random.seed(stream.integers(2**32, size=8, dtype=np.uint32))
        torch.default_generator.manual_seed(int(stream.integers(2**63)))
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def _operations(steps) -> Iterator:
    """Every operation of the policies in one of timm's transforms."""
    for step in steps.transforms:
        yield from getattr(step, "ops", ())
        for parts in getattr(step, "policy", ()):
            yield from parts


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's operation, whose strongest level keeps 0 bits: black, as older versions of Pillow did; newer refuse."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


class TrainTransform:
    """What :func:`train_transform` returns: a callable from an RGB image to float32 [3, H, W].

    It is pickled as its options and built anew where it is unpickled, so that a data-loading process of type spawn
    imports timm the way :func:`timm` does.
    """

    def __init__(self, options: dict):
        self.options = options
        size, aa = options["size"], options["aa"]
        try:
            self.steps = timm().data.create_transform(
                input_size=(3, *size),
                is_training=True,
                # Widths and heights in the output's own ratio: a wide output distorts no more than a square one.
                ratio=(3 / 4 * size[1] / size[0], 4 / 3 * size[1] / size[0]),
                scale=options["scale"],
                hflip=options["hflip"],
                color_jitter=options["color_jitter"],
                auto_augment=aa or None,
                interpolation=options["interpolation"],
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
                re_prob=options["reprob"],
                re_mode=options["remode"],
            )
        except (AssertionError, KeyError, ValueError) as error:  # what timm's parser of policies raises
            raise ValueError(
                f"aa must be a policy that timm knows, such as 'rand-m9-mstd0.5-inc1', or None, got {aa!r}"
            ) from error
        for operation in _operations(self.steps):
            if operation.aug_fn is timm().data.auto_augment.posterize:
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.steps(image)

    def __reduce__(self) -> tuple:
        return TrainTransform, (self.options,)

    def __repr__(self) -> str:
        return f"TrainTransform({self.options})"


def train_transform(
    size: tuple[int, int],
    aa: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = None,
    hflip: float = 0.5,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
) -> TrainTransform:
    """RandomResizedCrop, flip, RandAugment and random erasing by timm; the defaults are the official recipe's.

    Args:
        size: (H, W). A crop's width / height is log-uniform in (3/4, 4/3) times W / H.
        aa: a policy of timm's AutoAugment, RandAugment or AugMix, or None.
        color_jitter: strength for brightness, contrast and saturation, or None. As in timm it counts only without
            ``aa``, or with a policy "...-3a".
        hflip: probability of a horizontal flip; 0 where left and right matter, as in digits and text.
        scale: least and largest share of the image's area in a crop.
        interpolation: "bicubic", "bilinear", or "random" of the two.
        reprob, remode: probability and filling ("const", "rand", "pixel") of an erased rectangle.

    Raises:
        ValueError: an argument out of range. UserError: timm is not installed.
    """
    _check_size(size)
    _check_share("hflip", hflip)
    _check_share("reprob", reprob)
    if color_jitter is not None and not 0 <= color_jitter < math.inf:
        raise ValueError(f"color_jitter must be at least 0 or None, got {color_jitter}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be two ascending shares of the area in (0, 1], got {scale}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    if remode not in ERASE_MODES:
        raise ValueError(f"remode must be one of {', '.join(ERASE_MODES)}, got {remode!r}")
    return TrainTransform(
        {
            "size": tuple(size),
            "aa": aa,
            "color_jitter": color_jitter,
            "hflip": hflip,
            "scale": tuple(scale),
            "interpolation": interpolation,
            "reprob": reprob,
            "remode": remode,
        }
    )


class EvalTransform:
    """What :func:`eval_transform` returns: a callable from an RGB image to float32 [3, H, W]. It needs no timm."""

    def __init__(self, size: tuple[int, int], crop_pct: float | None):
        self.size, self.crop_pct = size, crop_pct

    def __call__(self, image: Image.Image) -> torch.Tensor:
        height, width = self.size
        if self.crop_pct is None:
            pixels = image.resize((width, height), Image.Resampling.BICUBIC)
        else:
            pixels = self._centre(image)
        return normalize(torch.from_numpy(np.array(pixels))[None])[0]

    def _centre(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        image = _cut_strip(image, width / height)
        full_width, full_height = covering_size(image.size, (int(height / self.crop_pct), int(width / self.crop_pct)))
        resized = image.resize((full_width, full_height), Image.Resampling.BICUBIC)
        # torchvision's CenterCrop rounds half to even here.
        left, top = round((full_width - width) / 2), round((full_height - height) / 2)
        return resized.crop((left, top, left + width, top + height))

    def __repr__(self) -> str:
        return f"EvalTransform(size={self.size}, crop_pct={self.crop_pct})"


def eval_transform(size: tuple[int, int], crop_pct: float | None = None) -> EvalTransform:
    """The official evaluation transform for an output ``size`` (H, W).

    Below 384 px: the shorter side is resized to int(size / crop_pct), bicubic, then the centre is cropped;
    ``crop_pct`` is 224 / 256 unless given. From 384 px on the whole image is warped to the size, bicubic, unless
    ``crop_pct`` is given (the official code ignores it there). A non-square output counts by its shorter side for
    the 384 px; the image then is resized, its shape kept, until it just covers (int(H / crop_pct), int(W / crop_pct)).

    Raises:
        ValueError: an argument out of range.
    """
    _check_size(size)
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be greater than 0 and at most 1, got {crop_pct}")
    if crop_pct is None and min(size) < WARP_SIDE:
        crop_pct = DEFAULT_CROP_PCT
    return EvalTransform(tuple(size), crop_pct)


def covering_size(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) at which an image of (width, height) just covers a ``target`` (H, W), shape kept.

    For a square target that is torchvision's Resize of the shorter side, rounding included.
    """
    (width, height), (target_height, target_width) = image_size, target
    if width * target_height >= height * target_width:
        return int(target_height * width / height), target_height
    return target_width, int(target_width * height / width)


def _cut_strip(image: Image.Image, aspect: float) -> Image.Image:
    """Cut the ends, which no centre crop sees, off an image that is very long: resized whole it would fill memory."""
    width, height = image.size
    longest = LONGEST * max(aspect, 1 / aspect)
    if max(width, height) <= longest * min(width, height):
        return image
    keep = math.ceil(longest * min(width, height))
    if width > height:
        left = (width - keep) // 2
        return image.crop((left, 0, left + keep, height))
    top = (height - keep) // 2
    return image.crop((0, top, width, top + keep))


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(f"size must be (height, width) in whole pixels, got {size}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value}")


# What importing torchvision raises where its extension did not load: its wheel on PyPI is built for CUDA.
_BROKEN = "operator torchvision::nms does not exist"
_declared: torch.library.Library | None = None  # a Library takes its declarations back when it is deleted


@cache
def timm() -> ModuleType:
    """Return timm, with ``timm.data`` imported. Data-loading processes of type spawn must call this too.

    timm imports torchvision, whose CUDA wheel does not import beside a CPU build of PyTorch for want of two operators
    that nothing here calls. In that case, and no other, they are declared.

    Raises:
        UserError: timm or torchvision is not installed.
    """
    try:
        _import_torchvision()
        import timm.data
    except ImportError as error:
        raise UserError(
            f"fine-tuning takes augmentation from timm, which cannot be imported ({describe_error(error)}); install it "
            f'with pip install "torch=={torch.__version__.partition("+")[0]}" timm, which leaves your PyTorch as it is.'
        ) from error
    return timm


def _import_torchvision() -> None:
    global _declared
    try:
        import torchvision
    except RuntimeError as error:
        if _BROKEN not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
