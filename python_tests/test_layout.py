"""PatchLayout and the random masks against brute force."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convnextv2_kernels import PatchLayout, random_kept, random_mask
from convnextv2_kernels.layout import mask_fault, num_kept

FIELDS = ("slot_of_patch", "patch_of_slot", "image_offsets")


@st.composite
def masks(draw, fewest=0):
    shape = draw(st.tuples(st.integers(fewest, 3), st.integers(1, 4), st.integers(1, 4)))
    return torch.from_numpy(draw(arrays(bool, shape)))


@st.composite
def kept_ids(draw):
    """Ids of equal counts in any order, and their grid."""
    gh, gw = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(0, gh * gw))
    rows = [draw(st.permutations(range(gh * gw)))[:kept] for _ in range(draw(st.integers(0, 3)))]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), kept), (gh, gw)


def assert_same(a: PatchLayout, b: PatchLayout) -> None:
    assert (a.grid, a.num_images, a.num_patches, a.patches_per_image) == (
        b.grid,
        b.num_images,
        b.num_patches,
        b.patches_per_image,
    )
    assert all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


@settings(max_examples=60)
@given(mask=masks(), radius=st.integers(0, 5))
def test_everything_against_a_walk_over_the_mask(mask, radius):
    layout = PatchLayout.from_mask(mask)
    n, gh, gw = mask.shape
    slots: dict[tuple[int, int, int], int] = {}
    for image in range(n):
        for row in range(gh):
            for col in range(gw):
                if not mask[image, row, col]:
                    slots[image, row, col] = len(slots)

    assert layout.grid == (gh, gw)
    assert (layout.num_images, layout.num_patches) == (n, len(slots))
    assert all(getattr(layout, field).dtype == torch.int32 for field in FIELDS)
    assert all(getattr(layout, field).is_contiguous() for field in FIELDS)
    sites = [(image, row, col) for image in range(n) for row in range(gh) for col in range(gw)]
    assert layout.slot_of_patch.shape == (n, gh * gw)
    assert layout.slot_of_patch.flatten().tolist() == [slots.get(site, -1) for site in sites]
    assert layout.patch_of_slot.tolist() == [(i * gh + r) * gw + c for i, r, c in slots]
    assert layout.image_of_slot.tolist() == [i for i, _, _ in slots]
    counts = [sum(site[0] == image for site in slots) for image in range(n)]
    assert layout.image_offsets.tolist() == [sum(counts[:image]) for image in range(n + 1)]
    assert torch.equal(layout.hidden_mask(), mask)

    steps = range(-radius, radius + 1)
    expected = [[slots.get((i, r + dr, c + dc), -1) for dr in steps for dc in steps] for i, r, c in slots]
    table = layout.neighbour_slots(radius)
    assert table.shape == (len(slots), (2 * radius + 1) ** 2) and table.dtype == torch.int32
    assert table.tolist() == expected
    assert layout.neighbour_slots(radius) is table, "built once"


@settings(max_examples=30)
@given(mask=masks(fewest=1))
def test_uniform_is_noticed(mask):
    counts = (~mask).flatten(1).sum(1).tolist()
    layout = PatchLayout.from_mask(mask)
    assert layout.patches_per_image == (counts[0] if len(set(counts)) == 1 else None)


@settings(max_examples=30)
@given(ids_and_grid=kept_ids())
def test_kept_ids_and_mask_give_the_same_layout(ids_and_grid):
    ids, grid = ids_and_grid
    before = ids.clone()
    mask = torch.ones(ids.shape[0], grid[0] * grid[1], dtype=torch.bool).scatter(1, ids, False)
    layout = PatchLayout.from_kept(ids, grid)
    if ids.shape[0]:
        assert_same(layout, PatchLayout.from_mask(mask.view(-1, *grid)))
    assert layout.patches_per_image == ids.shape[1] and layout.num_images == ids.shape[0]
    assert torch.equal(ids, before), "the ids are sorted in a copy"


@settings(max_examples=40)
@given(mask=masks(fewest=1))
def test_complement(mask):
    layout = PatchLayout.from_mask(mask)
    assert_same(layout.complement(), PatchLayout.from_mask(~mask))
    assert_same(layout.complement().complement(), layout)


def test_an_empty_batch():
    for layout in (
        PatchLayout.from_mask(torch.zeros(0, 2, 3, dtype=torch.bool)),
        PatchLayout.from_kept(torch.zeros(0, 4, dtype=torch.int64), (2, 3)),
    ):
        assert (layout.num_images, layout.num_patches, layout.grid) == (0, 0, (2, 3))
        assert layout.image_offsets.tolist() == [0]
        assert layout.neighbour_slots(1).shape == (0, 9)
        assert layout.hidden_mask().shape == (0, 2, 3)
        assert layout.complement().num_patches == 0


def test_equal_counts_need_no_data():
    """On the meta device there is no data to wait for: proof that these paths never read any back."""
    layout = PatchLayout.from_kept(torch.zeros(4, 19, dtype=torch.int64, device="meta"), (7, 7))
    assert (layout.num_images, layout.num_patches, layout.patches_per_image) == (4, 76, 19)
    assert layout.neighbour_slots(1).shape == (76, 9)
    assert layout.complement().num_patches == 120
    assert layout.hidden_mask().shape == (4, 7, 7)
    assert layout.image_of_slot.shape == (76,)
    assert random_mask(4, (7, 7), device="meta").shape == (4, 7, 7)


def test_to_moves_every_tensor():
    layout = PatchLayout.from_mask(random_mask(2, (3, 4)))
    layout.neighbour_slots(1)
    assert_same(layout.to("cpu"), layout)
    moved = layout.to("meta")
    assert moved.device.type == "meta" and layout.device.type == "cpu"
    assert all(getattr(moved, field).device.type == "meta" for field in FIELDS)
    assert moved.neighbour_slots(1).device.type == "meta"
    assert (moved.grid, moved.patches_per_image) == (layout.grid, layout.patches_per_image)


def test_repr_tells_the_shape():
    uniform = PatchLayout.from_mask(random_mask(2, (7, 7)))
    assert repr(uniform) == ("PatchLayout(grid=(7, 7), num_images=2, num_patches=38 (19 per image), device=cpu)")
    ragged = PatchLayout.from_mask(torch.tensor([[[True, False]], [[False, False]]]))
    assert "num_patches=3 (ragged)" in repr(ragged)


@pytest.mark.parametrize(
    ("grid", "ratio", "kept"),
    [((7, 7), 0.6, 19), ((7, 7), 0.75, 12), ((14, 14), 0.6, 78), ((2, 5), 0.5, 5), ((3, 3), 0.0, 9), ((3, 3), 1.0, 0)],
)
def test_random_mask_keeps_the_official_count(grid, ratio, kept):
    mask = random_mask(5, grid, ratio)
    assert mask.shape == (5, *grid) and mask.dtype == torch.bool
    assert (~mask).flatten(1).sum(1).tolist() == [kept] * 5
    ids = random_kept(5, grid, ratio)
    assert ids.shape == (5, kept) and ids.dtype == torch.int64
    assert all(len(set(row)) == kept for row in ids.tolist())


def test_random_masks_follow_the_generator():
    def draw(seed):
        return random_mask(4, (7, 7), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    mask = draw(3)
    assert not torch.equal(mask[0], mask[1]), "each image has a mask of its own"
    ids = random_kept(4, (7, 7), generator=torch.Generator().manual_seed(3))
    assert torch.equal(PatchLayout.from_kept(ids, (7, 7)).hidden_mask(), mask)


def test_every_patch_is_as_likely_to_stay():
    images = 4000
    visible = (~random_mask(images, (4, 3), 0.6)).flatten(1).double().mean(0).numpy()
    chance = int(12 * (1 - 0.6)) / 12
    five_sigma = 5 * np.sqrt(chance * (1 - chance) / images)
    assert np.abs(visible - chance).max() < five_sigma


@pytest.mark.parametrize(
    ("grid", "ratio", "words"),
    [
        ((2, 2), 0.6, None),
        ((7, 7), 0.97, None),
        ((7, 7), 0.001, None),
        ((1, 1), 0.6, r"only patch of 32x32 pixels .*expected img_size of at least 64 for mask_ratio 0\.6"),
        ((1, 1), 0.0, "expected img_size of at least 64$"),
        ((1, 2), 0.6, r"mask_ratio 0\.6 hides all 2 patches of 32x64 pixels.* at most 0\.5 at this size, or img_size"),
        ((2, 2), 0.8, r"at most 0\.75 at this size, or img_size of at least 96 at this ratio"),
        ((3, 3), 0.9, r"at most 0\.88 at this size, or img_size of at least 128 at this ratio"),
        # 5 * (1 - 0.8) is below 1 in float64
        ((1, 5), 0.8, r"mask_ratio of at most 0\.79 at this size"),
        ((7, 7), 1.0, r"hides all 49 patches of 224x224 pixels.* at most 0\.97 at this size$"),
        ((7, 7), 0.0, "hides none of the 49 patches of 224x224 pixels.*expected mask_ratio above 0"),
    ],
)
def test_ratios_that_train_nothing_are_told_with_what_would(grid, ratio, words):
    fault = mask_fault(grid, ratio)
    assert fault is None if words is None else re.search(words, fault)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.75, 0.8, 0.9, 0.95])
def test_the_told_ratio_and_size_are_the_limits(ratio):
    for sides in itertools.product(range(1, 7), repeat=2):
        fault = mask_fault(sides, ratio)
        assert (fault is None) == (0 < num_kept(sides, ratio) < sides[0] * sides[1])
        if fault is None:
            continue
        if found := re.search(r"mask_ratio of at most ([0-9.]+) at", fault):
            most = float(found[1])
            assert mask_fault(sides, most) is None and mask_fault(sides, most + 0.01) is not None
        side = int(re.search("img_size of at least ([0-9]+)", fault)[1]) // 32
        assert mask_fault((side, side), ratio) is None
        assert side == 2 or mask_fault((side - 1, side - 1), ratio) is not None
