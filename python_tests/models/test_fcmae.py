"""FCMAE: masks, shapes, initial values, saved memory, compilation, reconstruction, errors."""

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels.models import FCMAE, create_fcmae

DEPTHS, DIMS = (1, 1, 1, 1), (4, 8, 8, 16)


def model(**kwargs):
    torch.manual_seed(0)
    kwargs.setdefault("decoder_embed_dim", 16)
    return FCMAE(DEPTHS, DIMS, **kwargs)


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 64, 96)


def test_state_dict_names_are_the_official_ones():
    state = model().state_dict()
    assert state["mask_token"].shape == (1, 16, 1, 1)
    assert state["proj.weight"].shape == (16, 16, 1, 1)
    assert state["pred.weight"].shape == (3072, 16, 1, 1)
    block = {
        "dwconv.weight": (16, 1, 7, 7),
        "dwconv.bias": (16,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "pwconv1.weight": (64, 16),
        "pwconv1.bias": (64,),
        "grn.gamma": (1, 1, 1, 64),
        "grn.beta": (1, 1, 1, 64),
        "pwconv2.weight": (16, 64),
        "pwconv2.bias": (16,),
    }
    for prefix in ("decoder.0.", "encoder.stages.3.0."):
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        assert {k: tuple(v.shape) for k, v in found.items()} == block
    assert state["encoder.downsample_layers.0.0.weight"].shape == (4, 3, 4, 4)
    assert state["encoder.downsample_layers.0.1.weight"].shape == (4,)
    assert state["encoder.downsample_layers.1.0.weight"].shape == (4,)
    assert state["encoder.downsample_layers.1.1.weight"].shape == (8, 4, 2, 2)


def test_atto_has_the_official_number_of_keys():
    with torch.device("meta"):
        assert len(create_fcmae("convnextv2_atto").state_dict()) == 151


def test_initial_values():
    for name, p in model(decoder_embed_dim=64).named_parameters():
        if p.dim() == 1 and name.endswith("weight"):  # LayerNorm
            assert torch.equal(p, torch.ones_like(p)), name
        elif p.dim() == 1 or "grn" in name:
            assert not p.any(), name
        else:
            # Five standard errors of the deviation of that many normal numbers.
            assert abs(p.std().item() - 0.02) < 5 * 0.02 / (2 * p.numel()) ** 0.5, name


def test_initial_loss_is_near_one(images):
    """Normalised targets have variance one and the initial predictions are near zero."""
    assert abs(model()(images)[0].item() - 1) < 0.05


def test_default_mask_hides_the_official_number():
    m = model()
    images = torch.randn(2, 3, 224, 224)
    torch.manual_seed(4)
    _loss, pred, mask = m(images)
    assert pred.shape == (2, 3072, 7, 7) and mask.shape == (2, 49) and mask.dtype == torch.float32
    assert mask.sum(1).tolist() == [30, 30] and set(mask.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(m(images)[2], mask)
    torch.manual_seed(4)
    assert torch.equal(m(images)[2], mask)


def test_accepted_masks_are_equivalent(images):
    m = model()
    mask = ck.random_mask(3, (2, 3), 0.5)
    loss, pred, returned = m(images, mask)
    assert torch.equal(returned, mask.flatten(1).float())
    forms = (mask.flatten(1), mask.int(), mask.flatten(1).float(), ck.PatchLayout.from_mask(mask))
    for form in (*forms, returned):
        other = m(images, form)
        for got, want in zip(other, (loss, pred, returned), strict=True):
            assert torch.equal(got, want)


def test_image_size_is_only_a_default():
    m = model(img_size=(64, 96), patch_size=32)
    assert m.grid == (2, 3)
    _loss, pred, mask = m(torch.randn(2, 3, 128, 32))
    assert pred.shape == (2, 3072, 4, 1) and mask.shape == (2, 4)


def test_nothing_hidden_has_zero_loss(images):
    m = model()
    loss, pred, mask = m(images, torch.zeros(3, 6))
    assert loss.item() == 0 and not mask.any() and pred.isfinite().all()
    loss.backward()
    assert not m.pred.weight.grad.any()


def test_everything_hidden_is_finite(images):
    m = model(mask_ratio=1.0)
    loss, pred, mask = m(images, torch.ones(3, 6))
    loss.backward()
    assert mask.all() and loss.isfinite() and pred.isfinite().all()
    assert m.mask_token.grad.any() and not m.encoder.stages[0][0].pwconv1.weight.grad.any()


def test_loss_averages_over_hidden_patches_of_the_batch(images):
    """Not over images: an image that hides more weighs more."""
    m = model(norm_pix_loss=False)
    mask = torch.zeros(3, 2, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, :, 1:] = True
    loss, pred, _ = m(images, mask)
    error = (pred.flatten(2).transpose(1, 2) - m.patchify(images)).square().mean(-1)
    torch.testing.assert_close(loss, error[mask.flatten(1)].mean(), rtol=1e-5, atol=0)


def test_backward_saves_one_tensor_of_hidden_pixels(images):
    """Neither the target nor the prediction nor anything for the visible patches is saved in addition."""
    m = model()
    mask = ck.random_mask(3, (2, 3), 0.5)
    row = m.pred.weight.shape[0]
    parameters = {p.data_ptr() for p in m.parameters()}
    saved = {}

    def pack(t):
        if t.numel() >= row and t.data_ptr() not in parameters:
            saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _, _ = m(images, mask)
    hidden = int(mask.sum())
    of_pixels = [t for t in saved.values() if t.numel() % row == 0 and t.shape[-1] == row]
    assert [tuple(t.shape) for t in of_pixels] == [(hidden, row)]
    loss.backward()


def test_loss_and_predictions_share_a_backward_pass(images):
    m = model()
    mask = ck.random_mask(3, (2, 3), 0.5)

    def gradient(weight_of_loss, weight_of_pred):
        loss, pred, _ = m(images, mask)
        total = weight_of_loss * loss + weight_of_pred * (pred * pred).mean()
        return torch.autograd.grad(total, m.proj.weight)[0]

    torch.testing.assert_close(gradient(2, 3), 2 * gradient(1, 0) + 3 * gradient(0, 1))


def test_double_backward_is_refused(images):
    m = model()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(m(images)[0], m.pred.weight, create_graph=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_keeps_dtypes(images, dtype):
    m = model()
    mask = ck.random_mask(3, (2, 3), 0.5)
    want = m(images, mask)[0]
    with torch.autocast("cpu", dtype=dtype):
        loss, pred, _ = m(images, mask)
    loss.backward()
    assert loss.dtype == pred.dtype == torch.float32
    assert abs(loss.item() / want.item() - 1) < 1e-2
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in m.parameters())


def test_compiles_in_one_graph(images):
    torch.compiler.reset()  # shapes that other tests have compiled for would make these dynamic
    m = model()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    loss, pred, mask = compiled(images)
    loss.backward()
    grads = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    again, pred_again, _ = m(images, mask)
    again.backward()
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(pred, pred_again)
    for got, p in zip(grads, m.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)


@pytest.mark.parametrize("norm_pix_loss", (True, False))
def test_reconstruct(images, norm_pix_loss):
    m = model(norm_pix_loss=norm_pix_loss)
    mask = ck.random_mask(3, (2, 3), 0.5)
    patches = m.patchify(images)
    if norm_pix_loss:
        var, mean = torch.var_mean(patches, -1, keepdim=True)
        patches = (patches - mean) / (var + 1e-6).sqrt()
    perfect = patches.transpose(1, 2).unflatten(2, (2, 3))
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].expand_as(images)
    for form in (mask, mask.flatten(1).float(), ck.PatchLayout.from_mask(mask)):
        picture = m.reconstruct(images, perfect, form)
        torch.testing.assert_close(picture, images, rtol=1e-4, atol=1e-5)
        assert torch.equal(picture[~hidden], images[~hidden])
    wrong = m.reconstruct(images, perfect + 1, mask)
    assert torch.equal(wrong[~hidden], images[~hidden])
    assert ((wrong - images)[hidden] > 0.5).all()


def test_encode_and_layout(images):
    m = model(patch_size=32)
    mask = ck.random_mask(3, (2, 3), 0.5)
    features, layout = m.encode(images, mask)
    assert features.shape == (9, 1, 1, 16) and torch.equal(layout.hidden_mask(), mask)
    dense = m.encode_dense(images, mask)
    assert dense.shape == (3, 16, 2, 3)
    big = model(patch_size=64, img_size=64)
    hidden = torch.tensor([[True, False]])
    assert big.encode(torch.randn(1, 3, 64, 128), hidden)[0].shape == (1, 2, 2, 16)
    dense = big.encode_dense(torch.randn(1, 3, 64, 128), hidden)
    assert dense.shape == (1, 16, 2, 4) and not dense[..., :2].any() and dense[..., 2:].any()


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"patch_size": 16}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"img_size": 100}, "img_size"),
        ({"img_size": (64, 70)}, "img_size"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"decoder_embed_dim": -4}, "decoder_embed_dim"),
        ({"in_chans": 0}, "in_chans"),
        ({"grn_scope": "global"}, "grn_scope"),
    ],
)
def test_bad_arguments_are_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        model(**kwargs)


def test_bad_stages_are_named():
    with pytest.raises(ValueError, match="depths"):
        FCMAE((1, 1, 1), DIMS)
    with pytest.raises(ValueError, match=r"dims\[2\]"):
        FCMAE(DEPTHS, (4, 8, 0, 8))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.zeros(3, 3, 2), ValueError, r"mask .*\[3, 2, 3\] or \[3, 6\], got \[3, 3, 2\]"),
        (torch.zeros(2, 6), ValueError, r"mask .*got \[2, 6\]"),
        (torch.full((3, 6), 0.5), ValueError, "only 0 .* and 1"),
        ([[0] * 6] * 3, TypeError, "mask .*list"),
        (ck.PatchLayout.from_mask(torch.zeros(3, 1, 6, dtype=torch.bool)), ValueError, "grid"),
    ],
)
def test_bad_masks_are_refused(images, mask, error, words):
    with pytest.raises(error, match=words):
        model()(images, mask)


def test_bad_images_are_refused(images):
    m = model()
    with pytest.raises(ValueError, match="multiples of 32, got 60x96"):
        m(images[:, :, :60])
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \[3, 1, 64, 96\]"):
        m(images[:, :1])
    with pytest.raises(TypeError, match="uint8"):
        m(images.to(torch.uint8))
    with pytest.raises(TypeError, match="images .*list"):
        m([1])


@pytest.mark.parametrize("encoding", ["sparse", "masked_dense"])
@pytest.mark.parametrize(
    ("ratio", "size", "words"),
    [
        (0.6, (32, 32), "only patch of 32x32 pixels .*images of at least 64 for mask_ratio 0.6, or give a mask"),
        (0.6, (32, 64), "mask_ratio 0.6 hides all 2 patches of 32x64 pixels"),
        (0.8, (64, 64), "at most 0.75 at this size, or images of at least 96 at this ratio, or give a mask"),
        (0.9, (96, 96), "hides all 9 patches"),
        (0.0, (64, 64), "hides none of the 4 patches"),
    ],
)
def test_a_ratio_that_shows_or_hides_nothing_is_refused_but_not_such_a_mask(encoding, ratio, size, words):
    m = model(img_size=size, mask_ratio=ratio, encoding=encoding)
    images = torch.randn(2, 3, *size)
    with pytest.raises(ValueError, match=words):
        m(images)
    hidden = torch.full((2, *m.grid), ratio > 0)
    loss, _, mask = m(images, hidden)
    loss.backward()
    assert mask.bool().all() == hidden.all() and loss.isfinite()
    # As documented: with nothing hidden the loss is 0, with nothing visible the encoder has no gradient.
    assert (loss.item() > 0) == (ratio > 0)
    assert not m.encoder.stages[0][0].pwconv1.weight.grad.any()


def test_a_ratio_is_refused_for_other_sizes_than_the_first_too(images):
    m = model(img_size=64, mask_ratio=0.75)
    assert m(torch.randn(2, 3, 64, 64))[0].isfinite()
    with pytest.raises(ValueError, match="hides all 2 patches of 32x64 pixels"):
        m(torch.randn(2, 3, 32, 64))
