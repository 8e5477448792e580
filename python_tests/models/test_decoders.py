"""The decoders of Table 1a against formulas and by what they may see; the encoding that leaks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import DEPTHS, DIMS, images, stir

import convnextv2_kernels as ck
from convnextv2_kernels.models import FCMAE, patchify
from convnextv2_kernels.models.decoders import DECODERS, TransformerDecoder, sine_cosine_positions

OTHERS = [kind for kind in DECODERS if kind != "convnext"]


def model_of(**changes):
    return stir(FCMAE(DEPTHS, DIMS, img_size=64, decoder_embed_dim=64, **changes)).double()


def batch(n=3, height=96, width=64):
    mask = torch.rand(n, height // 32, width // 32, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0], mask[1] = True, False  # all hidden, none
    return images(n, height, width, dtype=torch.float64), mask


def by_hand(x, block, heads):
    """A pre-norm transformer block (Dosovitskiy et al. 2021) of tokens ``[N, L, D]``."""
    n, length, dim = x.shape
    attention = block.self_attn
    y = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-5)
    q, k, v = (y @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.view(n, length, heads, dim // heads).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(dim // heads)).softmax(-1)
    y = (weights @ v).transpose(1, 2).reshape(n, length, dim)
    x = x + y @ attention.out_proj.weight.T + attention.out_proj.bias
    y = F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, 1e-5)
    y = y @ block.linear1.weight.T + block.linear1.bias
    return x + 0.5 * y * (1 + torch.erf(y / math.sqrt(2))) @ block.linear2.weight.T + block.linear2.bias


@pytest.mark.parametrize("training", (True, False))
def test_transformer_is_the_formula(training):
    decoder = stir(TransformerDecoder(64, 2)).double().train(training)
    x = torch.randn(2, 2, 3, 64, dtype=torch.float64)
    tokens = x.flatten(1, 2) + torch.from_numpy(mae_positions(2, 3, 64))
    for block in decoder.layers:
        tokens = by_hand(tokens, block, heads=2)
    want = F.layer_norm(tokens, (64,), decoder.norm.weight, decoder.norm.bias, 1e-6).view(x.shape)
    torch.testing.assert_close(decoder(x, (), None), want, rtol=1e-10, atol=1e-10)


def mae_positions(height, width, dim):
    """By loops: half of the channels for the column, half for the row, each sines and then cosines."""
    table = np.zeros((height * width, dim))
    for row in range(height):
        for column in range(width):
            for half, place in enumerate((column, row)):
                for i in range(dim // 4):
                    angle = place / 10000 ** (i / (dim / 4))
                    at = half * dim // 2 + i
                    table[row * width + column, at] = math.sin(angle)
                    table[row * width + column, at + dim // 4] = math.cos(angle)
    return table


def test_positions_are_maes():
    want = mae_positions(3, 2, 16)
    np.testing.assert_allclose(sine_cosine_positions(3, 2, 16).numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", OTHERS)
def test_prediction_loss_and_reconstruction(kind):
    model, (x, mask) = model_of(decoder=kind), batch()
    loss, pred, hidden = model(x, mask)
    assert pred.shape == (3, 32 * 32 * 3, 3, 2) and torch.equal(hidden.bool(), mask.flatten(1))
    target = patchify(x, 32)
    mean = target.mean(-1, keepdim=True)
    target = (target - mean) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (pred.flatten(2).transpose(1, 2) - target).square().mean(-1)
    torch.testing.assert_close(loss, errors[mask.flatten(1)].mean(), rtol=1e-10, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    shown = patchify(model.reconstruct(x, pred, mask), 32)
    assert torch.equal(shown[~mask.flatten(1)], patchify(x, 32)[~mask.flatten(1)])


@pytest.mark.parametrize("kind", OTHERS)
def test_hidden_pixels_reach_no_prediction(kind):
    model, (x, mask) = model_of(decoder=kind), batch()
    other = torch.where(mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None], torch.nan, x)
    assert torch.equal(model(x, mask)[1], model(other, mask)[1])


def test_a_unet_predicts_pixels_in_the_order_of_patches():
    """Sites of stride 4 that hold their own pixels, and a prediction that passes them on."""
    model = FCMAE(DEPTHS, DIMS, img_size=64, decoder_embed_dim=8 * 48, decoder="unet", norm_pix_loss=False).double()
    x, mask = batch()
    model.decoder.forward = lambda *args: patchify(x, 4).view(3, 24, 16, 48)
    with torch.no_grad():
        model.pred.weight.copy_(torch.eye(48)[..., None, None])
        model.pred.bias.zero_()
    loss, pred, _ = model(x, mask)
    torch.testing.assert_close(pred.flatten(2).transpose(1, 2), patchify(x, 32), rtol=1e-12, atol=1e-12)
    assert loss < 1e-20


def test_skips_are_the_stages_of_the_encoder():
    """Only the UNet with skips reads the stages before the last."""
    x, mask = batch()
    for kind, reads in (("unet", True), ("unet-no-skip", False), ("transformer", False)):
        model = model_of(decoder=kind)
        layout = ck.PatchLayout.from_mask(mask)
        last, skips = model._encode_stages(x, layout)
        want = list(model.encoder.stage_outputs(x, layout))
        assert torch.equal(last, want[3]) and len(skips) == 3 * reads
        for skip, stage in zip(skips, want, strict=False):
            assert torch.equal(skip, stage)
        if reads:
            other = [torch.zeros_like(skip) for skip in skips]
            assert not torch.allclose(model._decode(last, skips, layout), model._decode(last, other, layout))


@pytest.mark.parametrize("kind", ("convnext", "unet"))
def test_encodings(kind):
    """masked_dense has the numbers of sparse; dense is the plain encoder on the masked image, and leaks."""
    sparse, (x, mask) = model_of(decoder=kind), batch()
    dense, masked = (model_of(decoder=kind, encoding=encoding) for encoding in ("dense", "masked_dense"))
    torch.testing.assert_close(masked(x, mask)[1], sparse(x, mask)[1], rtol=1e-8, atol=1e-8)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    blank = x.masked_fill(hidden, 0)
    maps = dense.encoder(blank)
    features, layout = dense.encode(x.masked_fill(hidden, torch.nan), mask)
    assert torch.equal(features, ck.ops.gather_patches(maps, layout))
    assert maps[mask].abs().max() > 0.1  # hidden sites have filled up
    assert not dense.encode_dense(x, mask).permute(0, 2, 3, 1)[mask].any()
    at_sparse = sparse.encode(x, mask)[0]
    assert (features - at_sparse).abs().max() > 0.01 * at_sparse.abs().max()
    assert (dense(x, mask)[1] - sparse(x, mask)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", OTHERS)
def test_checkpoints(kind):
    """Loaded by the same model, and by a classifier without the decoder; refused by another decoder and format."""
    model = model_of(decoder=kind)
    state, twin = model.state_dict(), FCMAE(DEPTHS, DIMS, decoder_embed_dim=64, decoder=kind).double()
    ck.load_checkpoint(twin, state)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), state.values(), strict=True))
    report = ck.load_checkpoint(ck.models.ConvNeXtV2(depths=DEPTHS, dims=DIMS), state)
    assert any(name.startswith("decoder.") for name in report.left_out)
    with pytest.raises(ValueError, match="does not fit the model: it lacks"):
        ck.load_checkpoint(FCMAE(DEPTHS, DIMS, decoder_embed_dim=64), state)
    with pytest.raises(ValueError, match="has a decoder with decoder.* which official-sparse does not have"):
        ck.convert_state_dict(state, "official-sparse")
    assert ck.convert_state_dict(state, "fcmae").keys() == state.keys()


@pytest.mark.parametrize(
    ("kind", "dim", "words"),
    [
        ("mlp", 64, "decoder must be one of convnext, unet, unet-no-skip, transformer, got 'mlp'"),
        ("unet", 20, "decoder_embed_dim must be a multiple of 8 for the UNet decoder, .*got 20"),
        ("transformer", 100, "decoder_embed_dim must be a multiple of 32, .*got 100"),
        ("transformer", 48, "decoder_embed_dim must be a multiple of 32, .*got 48"),
        ("transformer", 6, "decoder_embed_dim must be a multiple of 32, .*got 6"),
    ],
)
def test_bad_decoders_are_named(kind, dim, words):
    with pytest.raises(ValueError, match=words):
        FCMAE(DEPTHS, DIMS, decoder_embed_dim=dim, decoder=kind)
