"""Drop path with given factors: an image's factor then does not depend on the batch it comes in."""

import copy
import pickle

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels import nn as cnn

DIM, RATE = 4, 0.5


def make(grn="default"):
    torch.manual_seed(0)
    return cnn.ConvNeXtV2Block(DIM, drop_path=RATE, grn=grn).double()


def batch(packed):
    mask = torch.tensor([[[0, 1]], [[0, 0]], [[1, 1]], [[1, 0]]], dtype=torch.bool)
    if packed:
        layout = ck.PatchLayout.from_mask(mask)
        return torch.randn(layout.num_patches, 2, 2, DIM, dtype=torch.float64), layout, layout.image_of_slot.long()
    return torch.randn(4, 3, 5, DIM, dtype=torch.float64), None, torch.arange(4)


@pytest.mark.parametrize("grn", ("default", "l1,no-skip"))
@pytest.mark.parametrize("packed", (False, True))
def test_given_factors_are_used_and_nothing_is_drawn(packed, grn):
    block = make(grn)
    x, layout, image = batch(packed)
    branch = block.eval()(x, layout) - x
    block.train()
    factors = torch.tensor([2.0, 0.0, 2.0, 2.0])
    block.given_drop_path = factors
    state = torch.get_rng_state()
    got = block(x, layout)
    assert torch.equal(torch.get_rng_state(), state)
    want = x + branch * factors[image].view(-1, 1, 1, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)  # rounding of x + branch - x
    block.given_drop_path = factors.flip(0)
    assert not torch.equal(block(x, layout), got)


def test_an_image_keeps_its_factor_however_the_batch_is_split():
    block = make()
    x, _, _ = batch(packed=False)
    factors = torch.tensor([0.0, 2.0, 2.0, 0.0])
    block.given_drop_path = factors
    whole = block(x)
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        block.given_drop_path = factors[part]
        parts.append(block(x[part]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-13, atol=1e-14)  # products of other shapes


def test_factors_have_no_part_without_drop_path():
    block = make()
    x, _, _ = batch(packed=False)
    want = block.eval()(x)
    block.given_drop_path = torch.zeros(4)
    assert torch.equal(block(x), want)
    never = cnn.ConvNeXtV2Block(DIM).double()
    never.load_state_dict(block.state_dict())
    never.given_drop_path = torch.zeros(9)
    assert torch.equal(never.train()(x), want)


@pytest.mark.parametrize("grn", ("default", "l1"))
def test_wrong_factors_are_refused(grn):
    block = make(grn)
    x, layout, _ = batch(packed=True)
    for wrong in (torch.ones(3), torch.ones(4, 1), torch.ones(7)):
        block.given_drop_path = wrong
        with pytest.raises(ValueError, match=rf"given_drop_path has shape {list(wrong.shape)}".replace("[", r"\[")):
            block(x, layout)
    block.given_drop_path = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="requires grad"):
        block(x, layout)


def test_copies_pickles_and_the_state_dict():
    block = make()
    assert block.given_drop_path is None
    names = list(block.state_dict())
    for factors in (None, torch.tensor([2.0, 0.0, 2.0, 0.0])):
        block.given_drop_path = factors
        assert list(block.state_dict()) == names and not list(block.buffers())
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            same = twin.given_drop_path
            assert same is None if factors is None else torch.equal(same, factors) and same is not factors


def test_compiled_block_sees_new_factors():
    block = make()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x, _, _ = batch(packed=False)
    for factors in (torch.tensor([2.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 2.0, 2.0])):
        block.given_drop_path = factors
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-13, atol=1e-14)
        assert torch.equal(compiled(x)[factors == 0], x[factors == 0])
