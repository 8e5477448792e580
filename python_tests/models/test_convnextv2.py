"""The dense classifier: sizes, names, values, drop path, errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers.masked_dense import Encoder
from helpers.reference_models import timm

from convnextv2_kernels.models import CONFIGS, ConvNeXtV2, ConvNeXtV2Features, create_fcmae, create_model
from convnextv2_kernels.sizes import V1_NAMES, V2_NAMES

# Official parameter counts of classifier (1000 classes) and encoder, and state_dict entries.
OFFICIAL = {
    "atto": (3_708_400, 3_386_760, 140),
    "femto": (5_233_240, 4_847_472, 140),
    "pico": (9_066_280, 8_552_256, 140),
    "nano": (15_623_800, 14_981_520, 160),
    "tiny": (28_635_496, 27_864_960, 200),
    "base": (88_717_800, 87_690_752, 380),
    "large": (197_956_840, 196_416_768, 380),
    "huge": (660_289_640, 657_467_008, 380),
}


# ConvNeXt V1: parameters as the official README and timm (atto to nano) count them, in millions.
OFFICIAL_V1 = {
    "atto": 3.70,
    "femto": 5.22,
    "pico": 9.05,
    "nano": 15.59,
    "tiny": 28.59,
    "small": 50.22,
    "base": 88.59,
    "large": 197.77,
    "xlarge": 350.20,
}


@pytest.mark.parametrize("size", OFFICIAL_V1)
def test_sizes_of_v1(size):
    with torch.device("meta"):
        model = create_model(f"convnext_{size}")
        theirs = timm.create_model(f"convnext_{size}")
        features = create_model(f"convnext_{size}", features_only=True)
        encoder = create_fcmae(f"convnext_{size}").encoder
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == OFFICIAL_V1[size] and count == sum(p.numel() for p in theirs.parameters())
    assert set(features.state_dict()) == set(encoder.state_dict()) < set(model.state_dict())


def test_names_of_v1_are_the_official_ones():
    state = create_model("convnext_atto").state_dict()
    block = [name.removeprefix("stages.2.5.") for name in state if name.startswith("stages.2.5.")]
    layers = [f"{layer}.{kind}" for layer in ("dwconv", "norm", "pwconv1", "pwconv2") for kind in ("weight", "bias")]
    assert sorted(block) == sorted(["gamma", *layers])
    assert torch.equal(state["stages.2.5.gamma"], torch.full((160,), 1e-6))
    state = create_model("convnext_atto", layer_scale=0.1).state_dict()
    assert torch.equal(state["stages.2.5.gamma"], torch.full((160,), 0.1))
    with pytest.raises(ValueError, match="layer_scale must be a finite number other than 0, or None for none, got 0"):
        create_model("convnext_atto", layer_scale=0)


@pytest.mark.parametrize("size", OFFICIAL)
def test_sizes_are_the_official_ones(size):
    with torch.device("meta"):
        model = create_model(f"convnextv2_{size}")
        encoder = create_fcmae(f"convnextv2_{size}").encoder
    total, in_encoder, entries = OFFICIAL[size]
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in encoder.parameters()) == in_encoder
    assert len(model.state_dict()) == entries


def test_configs_are_the_official_sizes_and_small():
    assert set(V2_NAMES) == {f"convnextv2_{size}" for size in (*OFFICIAL, "small")}
    assert set(V1_NAMES) == {f"convnext_{size}" for size in OFFICIAL_V1} and {*V1_NAMES, *V2_NAMES} == set(CONFIGS)


def test_names_and_shapes():
    state = ConvNeXtV2(2, 10, (1, 1, 1, 2), (4, 8, 12, 16)).state_dict()
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    assert shapes["downsample_layers.0.0.weight"] == (4, 2, 4, 4)
    assert shapes["downsample_layers.0.1.bias"] == (4,)
    assert shapes["downsample_layers.3.0.weight"] == (12,)
    assert shapes["downsample_layers.3.1.weight"] == (16, 12, 2, 2)
    assert shapes["stages.3.1.dwconv.weight"] == (16, 1, 7, 7)
    assert shapes["stages.3.1.grn.gamma"] == (1, 1, 1, 64)
    assert shapes["stages.3.1.pwconv2.weight"] == (16, 64)
    assert shapes["norm.weight"] == (16,) and shapes["head.weight"] == (10, 16)


def test_equals_plain_layers():
    torch.manual_seed(0)
    depths, dims = (1, 1, 2, 1), (4, 8, 12, 16)
    model = ConvNeXtV2(3, 10, depths, dims).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    plain = Encoder(3, depths, dims).double()
    state = {k: v for k, v in model.state_dict().items() if k.startswith(("downsample", "stages"))}
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    features = plain(images, torch.zeros(2, 2, 3, dtype=torch.bool)).mean((2, 3))
    features = F.layer_norm(features, (16,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(images), features, rtol=1e-10, atol=1e-10)
    logits = F.linear(features, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(images), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(64, 64), (75, 118), (32, 63)])
def test_maps_of_the_stages(size):
    """As timm's ``features_only``: maps in NCHW, sides rounded down, of any image that has a pixel in each."""
    model = create_model("convnextv2_atto", features_only=True, out_indices=(0, 2, 3))
    assert (model.channels, model.strides) == ((40, 160, 320), (4, 16, 32))
    images = torch.randn(2, 3, *size)
    maps = model(images)
    assert [m.shape for m in maps] == [
        (2, c, size[0] // s, size[1] // s) for c, s in zip(model.channels, model.strides, strict=True)
    ]
    classifier = create_model("convnextv2_atto", num_classes=0)
    assert set(classifier.state_dict()) - set(model.state_dict()) == {"norm.weight", "norm.bias"}
    classifier.load_state_dict(model.state_dict(), strict=False)
    pooled = F.layer_norm(maps[-1].mean((2, 3)), (320,), eps=1e-6)
    torch.testing.assert_close(classifier(images), pooled, rtol=1e-4, atol=1e-4)


def test_what_is_left_over_of_a_side_has_no_part():
    """As in the official code, whose strided convolutions drop it."""
    model = ConvNeXtV2(3, 10, (1, 1, 1, 1), (4, 4, 4, 8)).double()
    images = torch.randn(2, 3, 67, 98, dtype=torch.float64, requires_grad=True)
    out = model(images)
    torch.testing.assert_close(out, model(images[:, :, :64, :96]))  # 98 // 4 is 24, as is 96 // 4
    (grad,) = torch.autograd.grad(out, images, torch.randn_like(out))
    assert not grad[:, :, 64:].any() and not grad[:, :, :, 96:].any() and grad[:, :, :64, :96].any()


def test_drop_path_grows_linearly():
    model = ConvNeXtV2(3, 10, (1, 1, 2, 1), (4, 4, 4, 4), drop_path_rate=0.4)
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    assert torch.equal(model(images), model(images))


def test_head_init_scale():
    torch.manual_seed(0)
    full = ConvNeXtV2(3, 10, (1, 1, 1, 1), (4, 4, 4, 8))
    torch.manual_seed(0)
    scaled = ConvNeXtV2(3, 10, (1, 1, 1, 1), (4, 4, 4, 8), head_init_scale=0.001)
    torch.testing.assert_close(scaled.head.weight, full.head.weight * 0.001)
    assert torch.equal(scaled.stages[3][0].pwconv1.weight, full.stages[3][0].pwconv1.weight)


def test_channels_last_images_give_the_same():
    model = ConvNeXtV2(3, 10, (1, 1, 1, 1), (4, 4, 4, 8))
    images = torch.randn(2, 3, 32, 64)
    assert torch.equal(model(images), model(images.to(memory_format=torch.channels_last)))


def test_arguments_are_passed_on():
    model = create_model("convnextv2_atto", num_classes=7, in_chans=1, drop_path_rate=0.1)
    assert model.head.weight.shape == (7, 320)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert model.stages[3][1].drop_path == pytest.approx(0.1)


def test_errors():
    for create in (create_model, create_fcmae):
        with pytest.raises(ValueError, match="convnextv2_atto, .*convnext_xlarge; got 'resnet50'"):
            create("resnet50")
    with pytest.raises(ValueError, match="num_classes"):
        ConvNeXtV2(num_classes=-1)
    for indices in ((), (0, 4), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="out_indices must be ascending stages from 0 to 3, got"):
            ConvNeXtV2Features(out_indices=indices)
    with pytest.raises(ValueError, match="drop_path_rate"):
        ConvNeXtV2(drop_path_rate=1.0)
    model = ConvNeXtV2(3, 10, (1, 1, 1, 1), (4, 4, 4, 8))
    with pytest.raises(ValueError, match="sides of at least 32 pixels, got 31x64"):
        model(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r"images must have shape \[N, 3, H, W\]"):
        model(torch.randn(3, 64, 64))
