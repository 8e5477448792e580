"""A folder of small pictures."""

from pathlib import Path

import pytest
from helpers.pictures import nested_folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of nine pictures, some in subfolders."""
    return nested_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def sources(photos) -> list[Path]:
    return sorted(photos.rglob("*.png"))
