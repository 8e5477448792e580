"""Networks of timm: the layers that are read, how their tokens become maps, and files that do not fit."""

import csv

import pytest
import torch
from helpers.pictures import class_folder
from helpers.reference_models import timm

from convnextv2_kernels import cli
from convnextv2_kernels.analysis import cosine_by_layer, feature_cosine_distance
from convnextv2_kernels.analysis.features import block_names, tapped
from convnextv2_kernels.analysis.timm_networks import TimmNetwork, load_timm_network
from convnextv2_kernels.data.images import IMAGENET_MEAN, IMAGENET_STD
from convnextv2_kernels.errors import UserError

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(**VIT).eval()


def conv_net(**more):
    torch.manual_seed(0)
    return timm.models.convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), num_classes=0, **more).eval()


def images(n=2, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(model, x, *taps):
    return {(found.name, found.tap): found.features for found in tapped(TimmNetwork(model, "timm:x"), x, taps=taps)}


@torch.no_grad()
def test_a_vit_is_read_after_the_activation_of_its_mlps(vit):
    """Token by token; the class token is no site."""
    x = images()
    found = features(vit, x, "act", "grn", "block")
    assert [key for key in found if key[0] == "blocks.0"] == [("blocks.0", tap) for tap in ("act", "grn", "block")]
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
    for number, block in enumerate(vit.blocks):
        attended = tokens + block.attn(block.norm1(tokens))
        hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(attended)))
        tokens = attended + block.mlp.fc2(hidden)
        name = f"blocks.{number}"
        for tap, want in (("act", hidden), ("grn", hidden), ("block", tokens)):
            # float32: other fusions of attention
            torch.testing.assert_close(found[name, tap], want[:, 1:].view(2, 4, 4, -1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("conv_mlp", (False, True))
@pytest.mark.parametrize("use_grn", (False, True))
def test_convnext_maps_have_channels_last(conv_mlp, use_grn):
    model, x = conv_net(conv_mlp=conv_mlp, use_grn=use_grn), images(size=64)
    if use_grn:
        for name, parameter in model.named_parameters():
            if "grn" in name:
                torch.nn.init.normal_(parameter)
    found = features(model, x, "act", "grn", "block")
    assert [f.stage for f in tapped(TimmNetwork(model, "x"), x, taps=("block",))] == [0, 1, 2, 2, 3]
    maps = model.stem(x)
    for stage, layer in enumerate(model.stages):
        maps = layer.downsample(maps)
        for number, block in enumerate(layer.blocks):
            y = block.conv_dw(maps).permute(0, 2, 3, 1)
            y = torch.nn.functional.layer_norm(y, y.shape[-1:], block.norm.weight, block.norm.bias, block.norm.eps)
            hidden = torch.nn.functional.gelu(y @ block.mlp.fc1.weight.flatten(1).T + block.mlp.fc1.bias)
            maps, name = block(maps), f"stages.{stage}.blocks.{number}"
            torch.testing.assert_close(found[name, "act"], hidden, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[name, "block"], maps.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
            assert torch.equal(found[name, "grn"], found[name, "act"]) == (not use_grn)


@torch.no_grad()
def test_curve_and_normalisation(vit):
    """The images' mean and deviation are those of timm's network; the curve is of its own hidden features."""
    model, x = TimmNetwork(vit, "timm:x"), images(3)
    layers = cosine_by_layer(model, [x], tap="act")
    want = [feature_cosine_distance(f.features).all.mean().item() for f in tapped(model, x, taps=("act",))]
    assert [layer.mean for layer in layers] == pytest.approx(want, abs=1e-12) and block_names(model) == [
        "blocks.0",
        "blocks.1",
    ]
    vit.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 32, 32)}
    other = TimmNetwork(vit, "timm:x")
    del vit.pretrained_cfg
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = x * std + mean
    (first,) = (f.features for f in tapped(other, x, taps=("act",)) if f.name == "blocks.0")
    (direct,) = (f.features for f in tapped(model, (pixels - 0.5) / 0.25, taps=("act",)) if f.name == "blocks.0")
    torch.testing.assert_close(first, direct, rtol=1e-4, atol=1e-5)
    assert other.img_size == (32, 32)


def test_weights_of_a_file(tmp_path):
    """Wrapped or not, with a head or not; the same numbers as the network that was saved."""
    torch.manual_seed(1)
    model = timm.create_model("test_convnext", num_classes=7).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "v1.pth")
    network = load_timm_network(f"timm:test_convnext@{tmp_path / 'v1.pth'}", "V1")
    x = images(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.model.model.forward_features(x), model.forward_features(x))
    assert network.about["checkpoint"] == "v1.pth" and len(network.about["sha256"]) == 64
    with pytest.raises(ValueError, match=r"v1.pth does not fit timm:test_vit: it lacks cls_token, .* more"):
        load_timm_network(f"timm:test_vit@{tmp_path / 'v1.pth'}", "x")
    twins = [load_timm_network("timm:test_convnext@random", "x", seed).model.state_dict() for seed in (1, 1, 2)]
    name = "model.stem.0.weight"
    assert torch.equal(twins[0][name], twins[1][name]) and not torch.equal(twins[0][name], twins[2][name])


def test_what_cannot_be_is_named(tmp_path, monkeypatch, vit):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for text, words in (
        ("timm:nope@random", "timm:nope is no network of timm"),
        ("timm:test_resnet@random", "timm:test_resnet has no blocks with an MLP"),
        ("timm:test_vit@", "timm:test_vit@ must be followed by a file of weights or by random"),
        ("timm:test_vit2", "weights of timm:test_vit2 are not on this machine, and nothing is downloaded"),
    ):
        with pytest.raises(ValueError, match=words):
            load_timm_network(text, "x")
    with pytest.raises(FileNotFoundError):
        load_timm_network(f"timm:test_vit@{tmp_path / 'none.pth'}", "x")
    network = TimmNetwork(vit, "timm:small")
    with pytest.raises(ValueError, match="timm:small cannot take images of 64x64 pixels"):
        list(tapped(network, images(size=64)))
    with pytest.raises(ValueError, match="layout must be None for a network of another library"):
        list(tapped(network, images(), layout=object()))

    def fail():
        raise UserError("no timm")

    monkeypatch.setattr("convnextv2_kernels.data.augment.timm", fail)
    with pytest.raises(UserError, match="timm:test_vit needs timm, which cannot be imported: pip install timm"):
        load_timm_network("timm:test_vit@random", "x")


def test_on_the_command_line(tmp_path, capsys):
    data, output = class_folder(tmp_path / "data"), tmp_path / "out"
    words = ["--data", str(data), "--output", str(output), "--device", "cpu"]
    networks = ["timm:test_vit@random", "timm:test_convnext@random"]
    assert cli.main(["analyze", "cosine", *networks, *words, "--tap", "act", "--images", "2"]) == 0
    with (output / "cosine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == {"test_vit", "test_convnext"} and rows[0]["name"] == "blocks.0"
    assert cli.main(["analyze", "selectivity", networks[1], *words, "--img-size", "64"]) == 0
    assert cli.main(["analyze", "activations", networks[0], *words, "--label", "a ViT", "--channels", "4"]) == 0
    capsys.readouterr()
    assert cli.main(["analyze", "knn", networks[0], *words]) == 1
    assert "is a network of timm, which cosine, selectivity and activations take" in capsys.readouterr().err
    assert cli.main(["analyze", "cosine", networks[0], "--random", *words]) == 1
    assert "--random without a checkpoint needs --model" in capsys.readouterr().err
