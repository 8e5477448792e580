"""The sparse encoder outside FCMAE: layouts, dense maps, compilation, errors."""

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels.models import SparseEncoder

DIMS = (4, 8, 8, 16)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = SparseEncoder(3, (1, 1, 1, 1), DIMS)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return encoder


def test_everything_visible_equals_the_dense_map(encoder):
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    encoder.double()
    for patch in (32, 64):
        images = images[:, :, :, : 96 // patch * patch]
        grid = (64 // patch, images.shape[3] // patch)
        layout = ck.PatchLayout.from_mask(torch.zeros(2, *grid, dtype=torch.bool))
        packed = encoder(images, layout)
        assert packed.shape == (layout.num_patches, patch // 32, patch // 32, DIMS[-1])
        dense = encoder(images)
        torch.testing.assert_close(ck.ops.scatter_patches(packed, layout), dense, rtol=1e-10, atol=1e-10)


def test_compiles_in_one_graph(encoder):
    images = torch.randn(2, 3, 64, 64)
    layout = ck.PatchLayout.from_kept(torch.tensor([[0, 3], [1, 2]]), (2, 2))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, layout), encoder(images, layout))
    torch.testing.assert_close(compiled(images), encoder(images))


def test_wrong_layouts_are_refused(encoder):
    images = torch.randn(2, 3, 64, 96)

    def layout(n, *grid):
        return ck.PatchLayout.from_mask(torch.zeros(n, *grid, dtype=torch.bool))

    with pytest.raises(ValueError, match="layout is of 3 images, but images holds 2"):
        encoder(images, layout(3, 2, 3))
    for grid in ((3, 2), (2, 2), (4, 6), (1, 3)):
        with pytest.raises(ValueError, match=f"layout has a grid of {grid[0]}x{grid[1]} patches"):
            encoder(images, layout(2, *grid))
    with pytest.raises(ValueError, match="layout is of 3 images, but images holds 2"):
        encoder(images, torch.zeros(3, 2, 3, dtype=torch.bool))  # a mask in its place
    with pytest.raises(TypeError, match="layout must be a PatchLayout, got list"):
        encoder(images, [[False] * 6] * 2)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    assert torch.equal(encoder(images, mask), encoder(images, layout(2, 2, 3)))


def test_feature_dtype_is_that_of_the_maps():
    torch.manual_seed(0)
    model = ck.models.FCMAE((1, 1, 1, 1), (8, 16, 24, 32), img_size=64, decoder_embed_dim=16)
    images = torch.randn(2, 3, 64, 64)
    mask = ck.random_mask(2, (2, 2), 0.5)
    results = {}
    for dtype in (None, torch.bfloat16):
        model.encoder.feature_dtype = dtype
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            features, _ = model.encode(images, mask)
            loss = model(images, mask)[0]
        loss.backward()
        assert features.dtype == (dtype or torch.float32)
        results[dtype] = loss, torch.cat([p.grad.flatten() for p in model.parameters()])
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    for wide, narrow in zip(*results.values(), strict=True):
        # bfloat16 has 8 bits: a few roundings of the residual stream
        assert (wide - narrow).norm() <= 0.05 * wide.norm()


def test_feature_dtype_must_be_a_float():
    with pytest.raises(ValueError, match="feature_dtype must be a floating-point dtype or None, got torch.int32"):
        SparseEncoder(3, (1, 1, 1, 1), (8, 8, 8, 8), feature_dtype=torch.int32)
