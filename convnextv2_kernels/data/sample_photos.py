"""The colour photographs that scikit-image and scikit-learn install; never a download."""

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from ..errors import UserError
from .decoding import open_rgb

PHOTOS = {
    "skimage": (
        "data",
        (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "rocket.jpg",
            "hubble_deep_field.jpg",
            "retina.jpg",
            "ihc.png",
            "motorcycle_left.png",
            "motorcycle_right.png",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}


def photo_paths() -> list[Path]:
    """Return the bundled photographs that exist on this machine, in a fixed order.

    The packages are located but not imported. Raises UserError where there is no photograph.
    """
    found = []
    for package, (folder, names) in PHOTOS.items():
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            found += [path for name in names if (path := Path(root, folder, name)).is_file()]
    if not found:
        raise UserError(
            "the demo trains on photographs that come with scikit-image and scikit-learn, and "
            "neither is installed: pip install scikit-image scikit-learn, or give --data FOLDER."
        )
    return found


def load_photos() -> tuple[list[str], list[Image.Image]]:
    """Return the names and the decoded RGB images of the bundled photographs."""
    paths = photo_paths()
    return [path.stem for path in paths], [open_rgb(path) for path in paths]
