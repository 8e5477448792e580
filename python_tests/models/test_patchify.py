"""Patches as vectors, in the official order, and back."""

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels.models import patchify, unpatchify
from convnextv2_kernels.models.loss import reconstruction_loss
from convnextv2_kernels.models.patchify import gather_pixels


def test_colour_runs_fastest():
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    rows = patchify(images, 4)
    assert rows.shape == (2, 6, 48)
    for patch, p, q, c in ((0, 0, 0, 0), (1, 2, 3, 1), (5, 3, 0, 2)):
        row, column = divmod(patch, 3)
        want = images[1, c, row * 4 + p, column * 4 + q]
        assert rows[1, patch, (p * 4 + q) * 3 + c] == want


def test_round_trip():
    images = torch.randn(2, 5, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, (2, 3)), images)


@pytest.mark.parametrize("strided", (False, True))
def test_gathering_equals_patchify(strided):
    images = torch.randn(2, 3, 8, 12)
    if strided:
        images = images.to(memory_format=torch.channels_last)
    mask = torch.rand(2, 2, 3) < 0.5
    layout = ck.PatchLayout.from_mask(mask)
    assert torch.equal(gather_pixels(images, layout), patchify(images, 4)[~mask.flatten(1)])


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        patchify(torch.zeros(1, 3, 8, 10), 4)
    with pytest.raises(ValueError, match="grid 2x2"):
        unpatchify(torch.zeros(1, 5, 48), 4, (2, 2))


def test_loss_gradient():
    torch.manual_seed(0)
    pred = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(reconstruction_loss(pred, target), torch.nn.functional.mse_loss(pred, target))
    assert torch.autograd.gradcheck(lambda p: reconstruction_loss(p, target) * 3, (pred,))


def test_loss_of_no_patch_is_zero():
    pred = torch.zeros(0, 5, requires_grad=True)
    loss = reconstruction_loss(pred, torch.zeros(0, 5))
    loss.backward()
    assert loss.item() == 0 and pred.grad.shape == (0, 5)
