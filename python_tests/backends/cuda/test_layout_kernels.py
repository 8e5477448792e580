"""The kernels that build a layout equal the plain construction of ``layout.py``."""

from __future__ import annotations

import pytest
import torch

from convnextv2_kernels import PatchLayout, random_kept
from convnextv2_kernels.backends import cuda

pytestmark = pytest.mark.skipif(cuda.load_error() is not None, reason=str(cuda.load_error()))

SHAPES = [(3, (7, 7), 0.6), (2, (1, 1), 0.0), (4, (3, 5), 0.5), (1, (40, 30), 0.9), (2, (2, 3), 1.0), (0, (2, 2), 0.5)]


@pytest.fixture
def kernels():
    return cuda.CUDABackend()


@pytest.mark.parametrize(("n", "grid", "ratio"), SHAPES)
def test_layout_from_kept(kernels, n, grid, ratio):
    ids = random_kept(n, grid, ratio)
    expected = PatchLayout.from_kept(ids, grid)
    slots, patches, offsets = kernels.layout_from_kept(ids.to(cuda.CUDABackend.device_type).contiguous(), grid)
    assert torch.equal(slots.cpu(), expected.slot_of_patch)
    assert torch.equal(patches.cpu(), expected.patch_of_slot)
    assert torch.equal(offsets.cpu(), expected.image_offsets)


@pytest.mark.parametrize("radius", (0, 1, 2, 3, 5))
@pytest.mark.parametrize(("n", "grid", "ratio"), SHAPES)
def test_neighbour_slots(kernels, n, grid, ratio, radius):
    layout = PatchLayout.from_kept(random_kept(n, grid, ratio), grid)
    tables = (
        layout.slot_of_patch.to(cuda.CUDABackend.device_type),
        layout.patch_of_slot.to(cuda.CUDABackend.device_type),
    )
    got = kernels.neighbour_slots(*tables, grid, radius)
    assert torch.equal(got.cpu(), layout.neighbour_slots(radius))


def test_ids_out_of_range_corrupt_nothing(kernels):
    ids = torch.tensor([[0, 5, 99], [-3, 1, 2]], device=cuda.CUDABackend.device_type)
    slots, patches, offsets = kernels.layout_from_kept(ids, (2, 3))
    assert slots.shape == (2, 6) and patches.shape == (6,) and offsets.tolist() == [0, 3, 6]
    assert int(slots.min()) >= -1 and int(slots.max()) < 6
