"""From a file to 8-bit RGB: which formats, how large, and what becomes of values and bands that RGB has no room for.

Nothing here depends on other images: a data set has one :class:`Decoding` for all its files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .._files import PNG_METADATA, open_regular
from ..errors import FileError
from . import MAX_PIXELS

# Those of IMAGE_EXTENSIONS and no other: Pillow goes by content, and would start Ghostscript for PostScript in "x.png".
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
# Ranges of grey values of more than 8 bits by the type they are stored in; of floating point, the usual one.
STORED: dict[str, tuple[float, float]] = {
    "uint12": (0, 2**12 - 1),
    "uint16": (0, 2**16 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "uint32": (0, 2**32 - 1),
    "float": (0, 1),
}
# What a file may hold that 8-bit RGB does not, and what is done about it: "3 images ...".
ODDITIES = {
    "bands": "hold more bands than colour and alpha: the others are left out",
    "deep colour": "hold colours of more than 8 bits: the upper 8 bits of each are taken, whatever the value range",
    "cmyk": "are CMYK: converted to RGB without a colour profile",
    "frames": "hold several frames or pages: the first is taken",
    "not finite": "hold NaN or infinite values: NaN and -inf become black, inf white",
    "white is 0": "store more than 8 bits with white as 0: they are not inverted",
}
OWN_PICTURE = "a picture that this program wrote"  # the end of the reason why it is no image to train on
_STRIP = 1 << 20  # pixels converted at a time
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT, _NO_DATA = 258, 262, 277, 338, 339, 42113
_COLOUR_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 8: 3}  # of TIFF's photometric interpretations
_ALPHA = (1, 2, 999)  # in TIFF's ExtraSamples; 999 is Corel Draw's


@dataclass(frozen=True)
class Decoding:
    """How the files of a data set become 8-bit RGB.

    ``value_range`` (low, high): grey values of more than 8 bits are mapped from it to 0..255, linearly, and clipped;
    None: from the range of the type that each file stores (floating point: 0..1). ``max_pixels``: of an image, above
    which it is refused before it is decoded; a pixel of more than 8 bits counts as two.
    """

    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS


PLAIN = Decoding()


@dataclass(frozen=True)
class Traits:
    """What a file holds that 8-bit RGB does not.

    ``stored``: the type of its grey values, one of :data:`STORED`, "" where they have 8 bits. ``low``, ``high``: least
    and greatest finite value, of "deep colour" in the upper 8 bits. ``oddities``: keys of :data:`ODDITIES`.
    """

    stored: str = ""
    low: float = 0.0
    high: float = 0.0
    oddities: tuple[str, ...] = ()


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow may lack AVIF


@contextmanager
def opened(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file without decoding it.

    Raises:
        FileError: no regular file, or more than ``max_pixels``.
        PIL.UnidentifiedImageError: none of :data:`FORMATS`. Pillow raises others for damaged headers.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file, _identified(path, file, max_pixels) as image:
        pixels = image.width * image.height
        deep = _stored_type(image) != ""
        if pixels * (1 + deep) > max_pixels:
            how = " of more than 8 bits, which count double" if deep else ""
            raise FileError(
                f"{path} has {image.width}x{image.height} pixels{how}, above the limit of {max_pixels} (--max-pixels)"
            )
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels  # decoders ask again, and would warn
        yield image


def _identified(path: Path, file: Any, max_pixels: int) -> Image.Image:
    """``Image.open`` without its limit on pixels, which is a global of the process and half a warning."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    prefix = file.read(16)
    for name in _formats():
        factory, accept = Image.OPEN[name]
        verdict = accept is None or accept(prefix)
        if not verdict or isinstance(verdict, str):  # a text says why this build cannot decode it
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # as in Image.open: not this format after all
        except Image.DecompressionBombError as error:
            raise FileError(f"{path} has more pixels than the limit of {max_pixels} (--max-pixels)") from error
    raise UnidentifiedImageError(f"{path} is no image of the formats {', '.join(_formats())}")


def open_rgb(path: Path, decoding: Decoding = PLAIN) -> Image.Image:
    """Decode a whole file to upright 8-bit RGB (EXIF orientation applied). Raises what :func:`opened` does, and more:
    Pillow's decoders raise whatever a broken file trips."""
    with opened(path, decoding.max_pixels) as image:
        return decoded(image, decoding)


def decoded(image: Image.Image, decoding: Decoding) -> Image.Image:
    """Decode what :func:`opened` opened to upright 8-bit RGB."""
    stored = _stored_type(image)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image, stored, decoding)


def to_rgb(image: Image.Image, decoding: Decoding = PLAIN) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB.

    Grey values of more than 8 bits are mapped from the value range (Pillow's own ``convert`` would clip them at 255).
    Alpha is dropped, as in the official loader.
    """
    return _rgb(image, _stored_type(image), decoding)


def _rgb(image: Image.Image, stored: str, decoding: Decoding) -> Image.Image:
    if image.mode == "RGB":
        return image
    if stored:
        return _grey(image, stored, decoding.value_range or STORED[stored]).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


def _stored_type(image: Image.Image) -> str:
    """Key of :data:`STORED`, "" where values have 8 bits. Pillow's modes alone do not tell: "I" holds several."""
    if image.mode == "F":
        return "float"
    if not image.mode.startswith("I"):
        return ""
    tags = getattr(image, "tag_v2", {})
    bits, kind = _first(tags.get(_BITS, 16)), _first(tags.get(_FORMAT, 1))
    if image.mode == "I" and tags:
        name = f"{'' if kind == 2 else 'u'}int{bits}"
        return name if name in STORED else "int32"
    return "uint12" if bits == 12 else "uint16"


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _has_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow keeps only the upper half of 16-bit bands. Known before the image is decoded alone."""
    if image.mode.startswith(("I", "F")) or not image.tile:
        return False
    arguments = image.tile[0][3]
    raw = arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments
    return isinstance(raw, str) and ";16" in raw


def _strips(image: Image.Image, stored: str) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, values [rows, W]) of parts of a decoded image, so that no copy of the whole is made."""
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        yield top, values.view(np.uint32) if stored == "uint32" else values  # Pillow's are signed


def _grey(image: Image.Image, stored: str, value_range: tuple[float, float]) -> Image.Image:
    low, high = value_range
    grey = Image.new("L", image.size)
    table = _levels(np.arange(2**16), low, high) if stored in ("uint12", "uint16") and image.mode != "I" else None
    for top, values in _strips(image, stored):
        levels = _levels(values, low, high) if table is None else table[values]
        grey.paste(Image.fromarray(levels), (0, top))
    return grey


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    exact = np.nan_to_num(values.astype(np.float64), nan=low, posinf=np.inf, neginf=-np.inf)
    return ((exact - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)


def inspect(path: Path, max_pixels: int = MAX_PIXELS) -> Traits | None:
    """Decode a file completely; return what 8-bit RGB has no room for, None where nothing is lost.

    Reading the header is not enough: a truncated JPEG has a valid one. Raises what :func:`open_rgb` does, FileError
    for an image without pixels and for a picture that this program wrote.
    """
    with opened(path, max_pixels) as image:
        stored, oddities = _stored_type(image), _oddities(image)
        image.load()
        _refuse_own(path, image)
        ImageOps.exif_transpose(image, in_place=True)
        if min(image.size) == 0:
            raise FileError(f"{path} has no pixels")
        if stored:
            low, high, finite = _extremes(image, stored)
            oddities += [] if finite else ["not finite"]
        else:
            low, high = _highest(image) if "deep colour" in oddities else (0.0, 0.0)
            _rgb(image, stored, Decoding())
        if _has_frames(image):
            oddities.append("frames")
        return Traits(stored, low, high, tuple(oddities)) if stored or oddities else None


def header_traits(path: Path, max_pixels: int = MAX_PIXELS) -> Traits | None:
    """:func:`inspect` by the header alone: without extremes, and nothing else is known to be sound."""
    with opened(path, max_pixels) as image:
        _refuse_own(path, image)
        stored, oddities = _stored_type(image), _oddities(image)
    return Traits(stored, 0.0, 0.0, tuple(oddities)) if stored or oddities else None


def _refuse_own(path: Path, image: Image.Image) -> None:
    if image.format == "PNG" and image.info.get("Software") == PNG_METADATA["Software"]:
        raise FileError(f"{path} is {OWN_PICTURE}")


def sample_values(path: Path, count: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """At most ``count`` finite grey values of a file of more than 8 bits, float64, at even distances. Those that a
    GeoTIFF marks as no data are left out."""
    with opened(path, max_pixels) as image:
        stored, no_data = _stored_type(image), _no_data(image)
        image.load()
        step = max(1, -(-image.width * image.height // count))
        parts, offset = [], 0
        for _, values in _strips(image, stored):
            flat = values.reshape(-1)
            parts.append(flat[-offset % step :: step].astype(np.float64))
            offset += flat.size
    values = np.concatenate(parts)
    return values[np.isfinite(values) & (values != no_data)]


def _no_data(image: Image.Image) -> float:
    try:
        return float(getattr(image, "tag_v2", {}).get(_NO_DATA, "nan"))
    except (TypeError, ValueError):
        return float("nan")


def _extremes(image: Image.Image, stored: str) -> tuple[float, float, bool]:
    """Least and greatest finite value, and whether all are finite."""
    low, high, finite = np.inf, -np.inf, True
    for _, values in _strips(image, stored):
        if values.dtype.kind == "f":
            kept = values[np.isfinite(values)]
            finite &= kept.size == values.size
            values = kept
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return (low, high, finite) if low <= high else (0.0, 0.0, finite)


def _highest(image: Image.Image) -> tuple[float, float]:
    """Least and greatest value of the colour bands."""
    extremes = image.getextrema()
    bands = extremes if isinstance(extremes[0], tuple) else (extremes,)
    colours = [band for band, name in zip(bands, image.getbands(), strict=True) if name.lower() != "a"]
    return float(min(low for low, _ in colours)), float(max(high for _, high in colours))


def _oddities(image: Image.Image) -> list[str]:
    found = []
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    photometric = _first(tags.get(_PHOTOMETRIC, 0))
    if photometric in _COLOUR_BANDS and tags:
        extra = tags.get(_EXTRA, ())
        alpha = _first(extra) in _ALPHA
        if _first(tags.get(_SAMPLES, 1)) > _COLOUR_BANDS[photometric] + alpha:
            found.append("bands")
    if _has_deep_colour(image):
        found.append("deep colour")
    if image.mode == "CMYK":
        found.append("cmyk")
    if tags and photometric == 0 and _stored_type(image):
        found.append("white is 0")
    return found


def _has_frames(image: Image.Image) -> bool:
    """Whether a file holds more than the frame that is taken; a photograph's preview (MPO) does not count."""
    if image.format == "MPO":
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a broken second frame says nothing against the first
        return False
