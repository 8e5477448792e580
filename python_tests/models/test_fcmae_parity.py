"""The sparse FCMAE equals a masked dense one: loss, predictions and every gradient, in float64."""

import pytest
import torch
from helpers.masked_dense import MaskedDenseFCMAE

import convnextv2_kernels as ck
from convnextv2_kernels.models import FCMAE

DEPTHS, DIMS, DECODER = (1, 1, 2, 1), (8, 16, 24, 32), 40
BACKENDS = ("reference", "auto")


def build(in_chans=3, patch_size=32, scope="image", norm_pix_loss=True, decoder_depth=1):
    torch.manual_seed(0)
    sparse = FCMAE(
        DEPTHS,
        DIMS,
        img_size=patch_size,
        in_chans=in_chans,
        patch_size=patch_size,
        decoder_depth=decoder_depth,
        decoder_embed_dim=DECODER,
        norm_pix_loss=norm_pix_loss,
        grn_scope=scope,
    ).double()
    # Not the initial values: with gamma and beta at zero GRN would not be tested at all.
    with torch.no_grad():
        for name, p in sparse.named_parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 1
            scale = 0.5 if "grn" in name or p.dim() == 1 else fan_in**-0.5
            p.copy_(torch.randn_like(p) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    dense = MaskedDenseFCMAE(DEPTHS, DIMS, in_chans, patch_size, DECODER, decoder_depth).double()
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


def masks(kind, n, grid):
    if kind == "uniform":
        return ck.random_mask(n, grid, 0.6)
    mask = torch.rand(n, *grid) < 0.5
    mask[0], mask[1] = True, False  # one image hidden entirely, one visible entirely
    mask[2].view(-1)[0], mask[2].view(-1)[-1] = True, False
    return mask


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(sparse, dense, images, mask, scope, norm_pix_loss=True):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss, pred, returned = sparse(images, mask)
        want_loss, want_pred = dense(images, mask, scope, norm_pix_loss)
        cotangent = torch.randn_like(pred)
    assert torch.equal(returned, mask.flatten(1).float())
    assert pred.shape == want_pred.shape
    assert relative(loss, want_loss) < 1e-12
    assert relative(pred, want_pred) < 1e-12

    def gradients(model, loss, pred):
        total = 1.7 * loss + (pred * cotangent).sum() * 1e-2
        return torch.autograd.grad(total, list(model.parameters()))

    got = dict(zip(dict(sparse.named_parameters()), gradients(sparse, loss, pred), strict=True))
    expected = gradients(dense, want_loss, want_pred)
    for (name, _), want in zip(dense.named_parameters(), expected, strict=True):
        assert want.abs().max() > 0, name
        assert relative(got[name], want) < 1e-9, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("kind", ("uniform", "ragged"))
def test_equals_masked_dense(kind, scope, backend):
    sparse, dense = build(scope=scope)
    torch.manual_seed(1)
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    with ck.use_backend(backend):
        compare(sparse, dense, images, masks(kind, 3, (2, 3)), scope)


@pytest.mark.parametrize("kind", ("uniform", "ragged"))
def test_patches_of_64_pixels(kind):
    sparse, dense = build(in_chans=2, patch_size=64, decoder_depth=2)
    torch.manual_seed(2)
    images = torch.randn(3, 2, 64, 192, dtype=torch.float64)
    compare(sparse, dense, images, masks(kind, 3, (1, 3)), "image")


def test_plain_pixel_loss_on_one_channel():
    sparse, dense = build(in_chans=1, norm_pix_loss=False)
    images = torch.randn(3, 1, 96, 32, dtype=torch.float64)
    compare(sparse, dense, images, masks("uniform", 3, (3, 1)), "image", norm_pix_loss=False)


def test_scopes_differ():
    """Otherwise the parity of both would not show that the encoder receives the scope."""
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    mask = masks("uniform", 3, (2, 3))
    image, batch = (build(scope=scope)[0](images, mask)[1] for scope in ("image", "batch"))
    assert relative(image, batch) > 1e-3


@pytest.mark.parametrize("kind", ("uniform", "ragged"))
def test_hidden_pixels_reach_no_feature(kind):
    sparse, _ = build()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    mask = masks(kind, 3, (2, 3))
    pixels = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    other = torch.where(pixels, torch.full_like(images, float("nan")), images)
    features, layout = sparse.encode(images, mask)
    assert torch.equal(features, sparse.encode(other, mask)[0])
    assert features.shape == (layout.num_patches, 1, 1, DIMS[-1])


def test_dense_features_equal_the_oracle():
    sparse, dense = build()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    mask = ck.random_mask(2, (2, 3), 0.5)
    features = sparse.encode_dense(images, mask)
    assert relative(features, dense.encoder(images, mask)) < 1e-12
    assert not features.permute(0, 2, 3, 1)[mask].any()
    whole = dense.encoder(images, torch.zeros_like(mask)).permute(0, 2, 3, 1)
    assert relative(sparse.encoder(images), whole) < 1e-12
