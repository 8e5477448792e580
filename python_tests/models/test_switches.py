"""The ablation switches of the models: which GRN, depth and width of the decoder, the mask ratio."""

import copy
import pickle

import pytest
import torch
from helpers.masked_dense import MaskedDenseFCMAE

import convnextv2_kernels as ck
from convnextv2_kernels.models import FCMAE, ConvNeXtV2, ConvNeXtV2Features, SparseEncoder, create_fcmae, create_model
from convnextv2_kernels.nn import ConvNeXtV2Block, GRNVariant

DEPTHS, DIMS = (1, 1, 2, 1), (4, 6, 8, 10)
STAGES = {"depths": DEPTHS, "dims": DIMS}
MAKERS = {
    "classifier": lambda **kwargs: ConvNeXtV2(num_classes=3, **STAGES, **kwargs),
    "features": lambda **kwargs: ConvNeXtV2Features(**STAGES, **kwargs),
    "encoder": lambda **kwargs: SparseEncoder(3, **STAGES, **kwargs),
    "fcmae": lambda **kwargs: FCMAE(**STAGES, decoder_embed_dim=12, decoder_depth=2, **kwargs),
}


def blocks(model):
    return [m for m in model.modules() if isinstance(m, ConvNeXtV2Block)]


def output(model, images):
    torch.manual_seed(5)  # FCMAE draws a mask
    out = model(images)
    return out if isinstance(out, torch.Tensor) else out[-1] if isinstance(out, list) else out[1]


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


@pytest.mark.parametrize("kind", MAKERS)
def test_every_block_has_the_variant(kind):
    images = torch.randn(2, 3, 64, 64)
    base = randomised(MAKERS[kind]())
    assert base.grn == GRNVariant()
    found = {}
    for text in ("default", "none", "l1,standardize,no-skip"):
        model = MAKERS[kind](grn=text)
        assert model.grn == GRNVariant.parse(text) and str(model.grn) == text
        assert len(blocks(model)) == (7 if kind == "fcmae" else 5)
        assert all(block.grn.variant == model.grn for block in blocks(model))
        assert list(model.state_dict()) == list(base.state_dict())
        if text == "none":  # a trained GRN does not fit
            with pytest.raises(RuntimeError, match="must be zero for the GRN variant 'none'"):
                model.load_state_dict(base.state_dict())
        model.load_state_dict({k: v * (text != "none" or ".grn." not in k) for k, v in base.state_dict().items()})
        found[text] = output(model, images)
        assert torch.equal(output(copy.deepcopy(model), images), found[text])
        assert torch.equal(output(pickle.loads(pickle.dumps(model)), images), found[text])
    assert torch.equal(found["default"], output(base, images))
    scale = found["default"].abs().max()
    for text in ("none", "l1,standardize,no-skip"):
        assert (found[text] - found["default"]).abs().max() > 1e-3 * scale, text
    without = copy.deepcopy(base)
    with torch.no_grad():
        for block in blocks(without):
            block.grn.gamma.zero_(), block.grn.beta.zero_()
    assert torch.equal(found["none"], output(without, images))


def test_factories_pass_the_switches_on():
    variant = GRNVariant("l1")
    assert create_model("convnextv2_atto", num_classes=2, grn="none").grn == GRNVariant(enabled=False)
    assert create_model("convnextv2_atto", features_only=True, grn=variant).grn == variant
    with torch.device("meta"):
        decoder = {"decoder_depth": 2, "decoder_embed_dim": 256}
        model = create_fcmae("convnextv2_atto", grn="l1", encoding="masked_dense", mask_ratio=0.75, **decoder)
    assert model.grn == model.encoder.grn == variant and model.encoding == "masked_dense"
    assert (len(model.decoder), model.mask_ratio) == (2, 0.75)
    with pytest.raises(ValueError, match="got 'l7'"):
        create_fcmae("convnextv2_atto", grn="l7")


@pytest.mark.parametrize("grn", ("none", "mean,inverse,no-skip"))
def test_a_training_step_of_a_variant(grn):
    """Every parameter that needs a gradient gets a finite one that is not zero; "none" keeps GRN's out."""
    model = MAKERS["fcmae"](grn=grn, img_size=64)
    model(torch.randn(4, 3, 64, 64))[0].backward()
    for name, p in model.named_parameters():
        if grn == "none" and ".grn." in name:
            assert not p.requires_grad and p.grad is None, name
        else:
            assert p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize(("depth", "width"), ((1, 8), (2, 256), (3, 20)))
def test_decoder_depth_and_width(depth, width):
    model = randomised(FCMAE(**STAGES, decoder_depth=depth, decoder_embed_dim=width)).double()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("encoder.")}
    assert shapes["proj.weight"] == (width, DIMS[-1], 1, 1) and shapes["mask_token"] == (1, width, 1, 1)
    assert shapes["pred.weight"] == (3072, width, 1, 1)
    assert {name.split(".")[1] for name in shapes if name.startswith("decoder.")} == set(map(str, range(depth)))
    oracle = MaskedDenseFCMAE(DEPTHS, DIMS, decoder_dim=width, decoder_depth=depth).double()
    oracle.load_state_dict(model.state_dict())
    images, mask = torch.randn(2, 3, 64, 96, dtype=torch.float64), ck.random_mask(2, (2, 3), 0.5)
    loss, pred, _ = model(images, mask)
    want_loss, want_pred = oracle(images, mask)
    # float64 sums in another order
    torch.testing.assert_close(loss, want_loss, rtol=1e-11, atol=0)
    torch.testing.assert_close(pred, want_pred, rtol=1e-11, atol=1e-12 * want_pred.abs().max().item())


@pytest.mark.parametrize("encoding", ("sparse", "masked_dense"))
@pytest.mark.parametrize(("ratio", "kept"), ((0.0, 9), (0.05, 8), (0.5, 4), (0.6, 3), (0.75, 2), (0.9, 0), (1.0, 0)))
def test_mask_ratio(ratio, kept, encoding):
    """``int(9 * (1 - ratio))`` patches stay; in a given mask that may be all of them, or none."""
    model = FCMAE(**STAGES, decoder_embed_dim=12, mask_ratio=ratio, encoding=encoding)
    images = torch.randn(2, 3, 96, 96)
    if kept in (0, 9):
        with pytest.raises(ValueError, match="hides all 9 patches" if kept == 0 else "hides none of the 9 patches"):
            model(images)
        loss, pred, mask = model(images, ck.random_mask(2, (3, 3), ratio))
    else:
        loss, pred, mask = model(images)
    assert (mask == 0).sum(1).tolist() == [kept, kept]
    loss.backward()
    assert pred.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    if kept == 9:
        assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters())
    else:  # normalised targets have variance one, predictions start near zero
        assert abs(loss.item() - 1) < 0.05 and model.mask_token.grad.any()
        assert model.encoder.stages[0][0].pwconv1.weight.grad.any() == (kept > 0)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"mask_ratio": -0.1}, r"mask_ratio must lie in \[0, 1\], got -0.1"),
        ({"mask_ratio": float("nan")}, "mask_ratio .*got nan"),
        ({"decoder_depth": 1.5}, "decoder_depth must be a positive integer, got 1.5"),
        ({"decoder_embed_dim": 0}, "decoder_embed_dim must be a positive integer, got 0"),
        ({"encoding": "SPARSE"}, "encoding must be one of sparse, masked_dense, dense, got 'SPARSE'"),
        ({"grn": "none,l1"}, "grn must be 'default', 'none', one of .* or comma-separated words .*got 'none,l1'"),
    ],
)
def test_bad_switches_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        FCMAE(**STAGES, **kwargs)
