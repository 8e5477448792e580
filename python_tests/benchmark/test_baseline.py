import pytest
import torch

from convnextv2_kernels import random_mask
from convnextv2_kernels.benchmark.baseline import Baseline, MaskedDenseFCMAE, baselines, encoder_sizes
from convnextv2_kernels.models import FCMAE


def small_fcmae(norm_pix_loss=True):
    torch.manual_seed(0)
    sizes = ([1, 1, 2, 1], [8, 12, 16, 24])
    model = FCMAE(*sizes, 96, decoder_embed_dim=20, norm_pix_loss=norm_pix_loss)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double()


def results(model, images, mask):
    loss, pred = model(images, mask)[:2]
    loss.backward()
    return loss.detach(), pred.detach(), {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("variant", baselines(), ids=lambda v: v.name)
def test_equals_the_sparse_model(variant, norm_pix_loss):
    sparse = small_fcmae(norm_pix_loss)
    dense = MaskedDenseFCMAE.from_state_dict(sparse.state_dict(), norm_pix_loss, variant)
    images = torch.randn(3, 3, 96, 64, dtype=torch.float64)
    mask = random_mask(3, (3, 2), 0.5, torch.Generator().manual_seed(1))
    mask[0] = True
    mask[1] = False
    loss, pred, grads = results(sparse, images, mask)
    dense_loss, dense_pred, dense_grads = results(dense, images, mask)
    torch.testing.assert_close(dense_loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(dense_pred, pred, rtol=1e-9, atol=1e-9 * pred.abs().max().item())
    assert dense_grads.keys() == grads.keys()
    for name, expected in grads.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            dense_grads[name], expected, rtol=1e-9, atol=1e-9 * scale, msg=lambda m, n=name: n + m
        )


def test_sizes_are_read_from_the_state_dict():
    assert encoder_sizes(small_fcmae().state_dict()) == ([1, 1, 2, 1], [8, 12, 16, 24])
    with pytest.raises(ValueError, match="expected an FCMAE state_dict"):
        encoder_sizes({"stages.0.0.dwconv.weight": torch.zeros(1)})


def test_unknown_baselines_are_refused():
    with pytest.raises(ValueError, match="layout is 'nhwc', expected one of"):
        Baseline("nhwc", "linear")
    with pytest.raises(ValueError, match="pointwise is 'conv', expected one of"):
        Baseline("nchw", "conv")


def test_weights_are_copies():
    sparse = small_fcmae()
    dense = MaskedDenseFCMAE.from_state_dict(sparse.state_dict())
    with torch.no_grad():
        dense.mask_token.fill_(7)
    assert not (sparse.mask_token == 7).any()
