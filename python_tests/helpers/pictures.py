"""Small pictures, each different, and folders of them."""

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
