"""The masked dense encoding: loss, predictions and every gradient of the sparse one, in float64."""

import copy

import pytest
import torch
from helpers.masked_dense import MaskedDenseFCMAE

import convnextv2_kernels as ck
from convnextv2_kernels.models import FCMAE, SparseEncoder
from convnextv2_kernels.models.masked_dense import masked_dense_features
from convnextv2_kernels.nn import GRNVariant

DEPTHS, DIMS, DECODER = (1, 1, 2, 1), (4, 6, 8, 10), 12
TEXTS = ["default", "none", "l1", "mean", "standardize", "inverse", "no-skip", "l1,standardize,no-skip", "mean,inverse"]
# float64 rounds at 2.2e-16. The two add up in other orders: some dozens of roundings on the way to a value, relative to
# the largest one, and a hundred times as many in a gradient, a sum over all sites that partly cancels.
VALUES, GRADIENTS = 1e-14, 1e-12


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:  # all but the GRN of the variant "none"
                scale = 0.5 if "grn" in name or p.dim() == 1 else p[0].numel() ** -0.5
                p.copy_(torch.randn_like(p) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.double()


def pair(**kwargs):
    """The same model in both encodings."""
    kwargs.setdefault("patch_size", 32)
    sparse = randomise(FCMAE(DEPTHS, DIMS, img_size=64, decoder_embed_dim=DECODER, **kwargs))
    dense = FCMAE(DEPTHS, DIMS, img_size=64, decoder_embed_dim=DECODER, encoding="masked_dense", **kwargs).double()
    assert list(dense.state_dict()) == list(sparse.state_dict())
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


def ragged(n, grid):
    mask = torch.rand(n, *grid) < 0.5
    mask[0], mask[1] = True, False  # one image hidden entirely, one visible entirely
    mask[2].view(-1)[0], mask[2].view(-1)[-1] = True, False
    return mask


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def results(model, images, mask):
    """``(loss, pred, {name: gradient})`` for a random cotangent, the images' gradient among them."""
    images = images.detach().clone().requires_grad_()
    loss, pred, _ = model(images, mask)
    cotangent = torch.randn(pred.shape, generator=torch.Generator().manual_seed(3), dtype=pred.dtype)
    (1.7 * loss + (pred * cotangent).sum() * 1e-2).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), pred.detach(), {"images": images.grad, **grads}


def compare(sparse, dense, images, mask):
    want_loss, want_pred, want = results(sparse, images, mask)
    loss, pred, got = results(dense, images, mask)
    assert relative(loss, want_loss) < VALUES and relative(pred, want_pred) < VALUES
    assert got.keys() == want.keys()
    trained = {name for name, p in sparse.named_parameters() if p.requires_grad}
    assert got.keys() == trained | {"images"}
    for name, value in want.items():
        assert value.abs().max() > 0, name
        assert relative(got[name], value) < GRADIENTS, name


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("grn", TEXTS)
def test_equals_the_sparse_encoding(grn, scope):
    sparse, dense = pair(grn=grn, grn_scope=scope)
    torch.manual_seed(1)
    compare(sparse, dense, torch.randn(4, 3, 64, 96, dtype=torch.float64), ragged(4, (2, 3)))


@pytest.mark.parametrize("grn", ("default", "mean,standardize"))
def test_patches_of_64_pixels(grn):
    sparse, dense = pair(grn=grn, patch_size=64, in_chans=2)
    torch.manual_seed(1)
    compare(sparse, dense, torch.randn(3, 2, 64, 192, dtype=torch.float64), ragged(3, (1, 3)))


@pytest.mark.parametrize("scope", ("image", "batch"))
def test_equals_the_oracle(scope):
    """The oracle shares no code with the package."""
    _, dense = pair(grn_scope=scope)
    oracle = MaskedDenseFCMAE(DEPTHS, DIMS, decoder_dim=DECODER).double()
    oracle.load_state_dict(dense.state_dict())
    images, mask = torch.randn(3, 3, 64, 96, dtype=torch.float64), ck.random_mask(3, (2, 3), 0.5)
    loss, pred, _ = dense(images, mask)
    want_loss, want_pred = oracle(images, mask, scope)
    assert relative(loss, want_loss) < VALUES and relative(pred, want_pred) < VALUES
    assert relative(dense.encode_dense(images, mask), oracle.encoder(images, mask, scope)) < VALUES


@pytest.mark.parametrize("grn", ("default", "none", "mean,inverse"))
def test_hidden_pixels_change_nothing(grn):
    """Not even NaN, in the features and in the gradients of the encoder."""
    _, dense = pair(grn=grn)
    images, mask = torch.randn(3, 3, 64, 96, dtype=torch.float64), ragged(3, (2, 3))
    pixels = mask.repeat_interleave(32, 1).repeat_interleave(32, 2).unsqueeze(1)
    found = []
    for filler in (images, torch.randn_like(images), torch.full_like(images, float("nan"))):
        dense.zero_grad()
        given = torch.where(pixels, filler, images).requires_grad_()
        features, layout = dense.encode(given, mask)
        assert features.shape == (layout.num_patches, 1, 1, DIMS[-1])
        features.backward(torch.randn(features.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
        assert not given.grad[pixels.expand_as(given)].any() and given.grad.any()
        found.append([features.detach(), *(p.grad.clone() for p in dense.encoder.parameters() if p.requires_grad)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    whole = masked_dense_features(dense.encoder, images, layout)
    assert not whole[mask].any() and torch.equal(ck.ops.gather_patches(whole, layout), found[0][0])
    assert not dense.encode_dense(images, mask).permute(0, 2, 3, 1)[mask].any()


def test_narrow_types_stay_finite_where_nothing_is_visible():
    """Without visible sites "inverse" divides by eps alone, which float16 cannot hold."""
    dense = FCMAE(DEPTHS, DIMS, decoder_embed_dim=DECODER, grn="inverse", encoding="masked_dense")
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    images, mask = torch.randn(3, 3, 64, 96), ragged(3, (2, 3))
    with torch.autocast("cpu", dtype=torch.float16):
        features, _ = dense.encode(images, mask)
    features.backward(torch.randn_like(features))
    assert features.dtype == torch.float32 and features.isfinite().all()
    assert all(p.grad.isfinite().all() for p in dense.encoder.parameters())


@pytest.mark.parametrize("kind", (True, False))
def test_everything_hidden_or_visible(kind):
    sparse, dense = pair()
    images, mask = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.full((2, 2, 2), kind)
    want_loss, want_pred, want = results(sparse, images, mask)
    loss, pred, got = results(dense, images, mask)
    assert relative(pred, want_pred) < VALUES and abs(loss - want_loss) < VALUES
    for name, value in want.items():
        assert got[name].isfinite().all() and (got[name] - value).abs().max() < GRADIENTS * (1 + value.abs().max())


@pytest.mark.parametrize("grn", ("default", "l1"))
def test_given_drop_path_is_that_of_the_sparse_encoder(grn):
    torch.manual_seed(0)
    encoder = randomise(SparseEncoder(3, DEPTHS, DIMS, drop_path_rate=0.5, grn=grn))
    layout = ck.PatchLayout.from_mask(ragged(4, (2, 2)))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for stage in encoder.stages:
        for block in stage:
            keep = 1 - block.drop_path
            block.given_drop_path = torch.empty(4, dtype=torch.float64).bernoulli_(keep) / keep
    dropped = encoder(images, layout)
    masked = ck.ops.gather_patches(masked_dense_features(encoder, images, layout), layout)
    assert relative(masked, dropped) < VALUES
    assert relative(encoder.eval()(images, layout), dropped) > 1e-3


def test_feature_dtype_and_autocast():
    """In bfloat16 both encodings round alike: as far from each other as from float32."""
    sparse, dense = (m.float() for m in pair(feature_dtype=torch.bfloat16))
    images, mask = torch.randn(3, 3, 64, 96), ragged(3, (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, (masked, _) = sparse.encode(images, mask)[0], dense.encode(images, mask)
    assert packed.dtype == masked.dtype == torch.bfloat16
    exact = copy.deepcopy(sparse).double()
    exact.encoder.feature_dtype = None
    wide = exact.encode(images.double(), mask)[0]
    error, other = ((narrow.double() - wide).norm() for narrow in (masked, packed))
    assert error < 2 * other < 0.1 * wide.norm()


@pytest.mark.parametrize("grn", ("default", "l1,standardize"))
def test_compiles_in_one_graph(grn):
    _, dense = pair(grn=grn)
    images, layout = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([[0, 3], [1, 2]])
    layout = ck.PatchLayout.from_kept(layout, (2, 2))
    want = results(dense, images, layout)
    dense.zero_grad()
    got = results(torch.compile(dense, fullgraph=True, backend="aot_eager"), images, layout)
    assert relative(got[0], want[0]) < VALUES and relative(got[1], want[1]) < VALUES
    for (name, value), compiled in zip(want[2].items(), got[2].values(), strict=True):
        assert relative(compiled, value) < GRADIENTS, name


def test_errors():
    _, dense = pair()
    images, mask = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.zeros(2, 4)
    with ck.use_backend("triton"), pytest.raises(RuntimeError, match="'masked_dense' was asked of backend 'triton'"):
        dense.encode(images, mask)
    with ck.use_backend("reference"):
        assert dense.encode(images, mask)[0].shape == (8, 1, 1, DIMS[-1])
    with pytest.raises(ValueError, match="encoding must be one of sparse, masked_dense, dense, got 'leaky'"):
        FCMAE(DEPTHS, DIMS, encoding="leaky")
    other = ck.PatchLayout.from_mask(torch.zeros(3, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="layout is of 3 images, but images holds 2"):
        masked_dense_features(dense.encoder, images, other)
    assert "grn='default', encoding='masked_dense'" in repr(dense) and dense.grn == GRNVariant()


def test_threads_leave_the_choice_of_backend_alone():
    import sys
    import threading

    from convnextv2_kernels import backends, models

    model = models.FCMAE((1,) * 4, (8,) * 4, img_size=64, decoder_embed_dim=8, encoding="masked_dense").eval()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: [model(torch.randn(1, 3, 64, 64)) for _ in range(4)]) for _ in range(4)
        ]
        before = backends.forced()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert backends.forced() == before
    finally:
        sys.setswitchinterval(interval)
