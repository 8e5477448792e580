"""The pictures of the training tests."""

from train.conftest import _one_thread, photos, sources  # noqa: F401
