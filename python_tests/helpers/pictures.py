"""Small pictures, each different, and folders of them."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(index: int, size: tuple[int, int] = (80, 72)) -> Image.Image:
    """A smooth picture of (width, height), different for each index."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((index + 1 + c) * x / 23 + c) * np.cos((index + 2) * y / 19) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


def nested_folder(folder: Path) -> Path:
    """Nine pictures, some in subfolders."""
    (folder / "sub" / "deeper").mkdir(parents=True)
    for index in range(9):
        place = folder if index < 5 else folder / "sub" if index < 7 else folder / "sub" / "deeper"
        picture(index).save(place / f"{index}.png")
    return folder


def class_folder(folder: Path, classes: int = 3, each: int = 4) -> Path:
    """``each`` pictures in each of the subfolders class0, class1, ..."""
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            picture(label * each + number).save(folder / f"class{label}" / f"{number}.png")
    return folder


def write_tiff(path: Path, values: np.ndarray, order: str = "<", **tags: tuple[int, ...] | bytes) -> Path:
    """An uncompressed TIFF of ``values`` [H, W] or [H, W, bands] as they are, in byte order "<" or ">".

    ``tags`` by their number, such as t262=(2,), stand in for what follows from ``values``; bytes are text; an empty
    tuple leaves the tag out.
    """
    height, width, bands = (*values.shape, 1)[:3]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    fields: dict[int, tuple[int, ...] | bytes] = {
        256: (width,),
        257: (height,),
        258: (8 * values.dtype.itemsize,) * bands,
        259: (1,),
        262: (2 if bands > 2 else 1,),
        273: (8,),
        277: (bands,),
        278: (height,),
        279: (len(data),),
        339: (kind,) * bands,
    }
    fields |= {int(name[1:]): value for name, value in tags.items()}
    fields = {number: value for number, value in sorted(fields.items()) if value != ()}
    directory, beside = struct.pack(f"{order}H", len(fields)), b""
    start = 8 + len(data)
    end = start + 2 + 12 * len(fields) + 4
    for number, value in fields.items():
        packed = value if isinstance(value, bytes) else struct.pack(f"{order}{len(value)}I", *value)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", end + len(beside))
        beside += packed if len(packed) > 4 else b""
        directory += struct.pack(f"{order}HHI", number, 2 if isinstance(value, bytes) else 4, len(value)) + place
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", start)
    path.write_bytes(head + data + directory + struct.pack(f"{order}I", 0) + beside)
    return path


def write_png(path: Path, size: tuple[int, int], depth: int, colour: int, rows: bytes, *chunks: bytes) -> Path:
    """A PNG of (width, height); ``rows`` are packed samples with a filter byte before each row, ``chunks`` raw ones
    before the image."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    image = png_chunk(b"IDAT", zlib.compress(rows, 9))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join([header, *chunks, image, png_chunk(b"IEND", b"")]))
    return path


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
