"""ConvNeXt V1 against timm, transformers and torchvision, in both directions; V1 and V2 do not mix."""

from functools import partial

import pytest
import torch
from helpers.reference_models import timm, transformers
from torch import nn
from torchvision.models import convnext as torchvision

from convnextv2_kernels import cli
from convnextv2_kernels.checkpoints import convert_state_dict, load_checkpoint
from convnextv2_kernels.checkpoints.storage import read_checkpoint_file
from convnextv2_kernels.models import FCMAE, ConvNeXtV2, SparseEncoder
from convnextv2_kernels.sizes import V1_BLOCK

from .samples import CLASSES, DEPTHS, DIMS, assert_same, classifier, encoder_of, module_of, randomize, without

SIZES = {"depths": DEPTHS, "dims": DIMS}


def ours():
    return classifier(**V1_BLOCK).double().eval()


def autoencoder():
    return randomize(FCMAE(DEPTHS, DIMS, img_size=64, decoder_depth=2, decoder_embed_dim=12, **V1_BLOCK)).double()


def of_timm(conv_mlp: bool, **kwargs):
    kwargs = {**SIZES, "num_classes": CLASSES, "conv_mlp": conv_mlp} | kwargs
    return timm.create_model("convnext_atto", **kwargs)


def of_transformers(kind="ConvNextForImageClassification"):
    config = transformers.ConvNextConfig(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=CLASSES, layer_norm_eps=1e-6
    )
    return getattr(transformers, kind)(config)


def of_torchvision():
    blocks = zip(DIMS, (*DIMS[1:], None), DEPTHS, strict=True)
    return torchvision.ConvNeXt([torchvision.CNBlockConfig(*block) for block in blocks], num_classes=CLASSES)


OTHERS = {
    "timm": (partial(of_timm, False), "timm"),
    "timm, 1x1 convolutions": (partial(of_timm, True), "timm"),
    "transformers": (of_transformers, "transformers V1"),
    "torchvision": (of_torchvision, "torchvision"),
}


def outputs(model, x):
    out = model(x)
    return getattr(out, "logits", out)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("code_base", OTHERS)
def test_others_compute_the_same_with_our_weights_and_we_with_theirs(code_base):
    make, name = OTHERS[code_base]
    theirs, mine, x = randomize(make()).double().eval(), ours(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    own = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    expected = outputs(theirs, x)
    report = load_checkpoint(theirs, mine.state_dict())
    assert (report.source_format, report.target_format) == ("official", name)
    assert len(report.loaded) == len(own) and not report.kept_initial + report.left_out
    assert_close(outputs(theirs, x), mine(x))
    report = load_checkpoint(mine, own)
    assert report.source_format == name and len(report.loaded) == len(mine.state_dict())
    assert_close(mine(x), expected)


@pytest.mark.parametrize("code_base", OTHERS)
def test_conversion_gives_the_names_and_shapes_of_the_code_base(code_base):
    theirs, state = OTHERS[code_base][0]().state_dict(), ours().state_dict()
    kind = {"conv_mlp": "1x1" in code_base} if code_base.startswith("timm") else {}
    converted = convert_state_dict(state, code_base.partition(",")[0], **kind)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in theirs.items()}
    assert_same(convert_state_dict(converted, "official"), state)
    assert all(tensor.is_contiguous() for tensor in converted.values())


@pytest.mark.parametrize("size", ["atto", "nano", "tiny", "xlarge"])
def test_pointwise_layers_as_timm_builds_them(size):
    first = {"atto": 40, "nano": 80, "tiny": 96, "xlarge": 256}[size]
    config = {"depths": (1, 1, 1, 1), "dims": (first, 4, 4, 4), "num_classes": 2}
    converted = convert_state_dict(ConvNeXtV2(**config, **V1_BLOCK).state_dict(), "timm")
    theirs = timm.create_model(f"convnext_{size}", **config).state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in theirs.items()}


def test_names_of_mmpretrain_and_of_our_autoencoder():
    state = ours().state_dict()
    other = convert_state_dict(state, "mmpretrain")
    assert other["backbone.stages.1.1.gamma"].shape == (16,) and len(other) == len(state)
    load_checkpoint(module_of(other), state)
    assert_same(convert_state_dict(other, "official"), state)
    fcmae = autoencoder().state_dict()
    assert {"encoder.stages.1.1.gamma", "decoder.1.gamma"} <= set(fcmae) and not any(".grn." in key for key in fcmae)
    assert_same(convert_state_dict(fcmae, "fcmae"), fcmae)
    for to in ("official", "timm", "transformers", "mmpretrain", "torchvision"):
        converted = convert_state_dict(fcmae, to)
        report = load_checkpoint(SparseEncoder(3, DEPTHS, DIMS, **V1_BLOCK).double(), converted)
        assert not report.kept_initial + report.left_out


@torch.no_grad()
def test_parts_of_the_models_of_others():
    mine, x = ours(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    base = of_transformers("ConvNextModel").double().eval()
    report = load_checkpoint(base, mine.state_dict())
    assert report.target_format == "transformers base model" and not report.kept_initial
    assert_close(base(x).pooler_output, mine.forward_features(x))
    maps = of_timm(False, features_only=True).double().eval()
    load_checkpoint(maps, convert_state_dict(mine.state_dict(), "transformers"))
    assert_close(maps(x)[-1].permute(0, 2, 3, 1), mine.run_stages(x))
    detector = nn.ModuleDict({"backbone": of_torchvision().double(), "neck": nn.Linear(2, 2)})
    report = load_checkpoint(detector, mine.state_dict())
    assert report.kept_initial == ("neck.weight", "neck.bias")
    assert_close(detector["backbone"].eval()(x), mine(x))


def test_a_model_of_one_version_refuses_a_file_of_the_other():
    v1, v2 = classifier(**V1_BLOCK), classifier()
    before = {key: tensor.clone() for key, tensor in v2.state_dict().items()}
    one, two = r"a ConvNeXt V1 \(layer scale, no GRN\)", r"a ConvNeXt V2 \(GRN\)"
    for model, other, words in ((v2, v1, (one, two)), (v1, v2, (two, one))):
        with pytest.raises(ValueError, match=f"does not fit the model: it is {words[0]}, and the model is {words[1]}$"):
            load_checkpoint(model, other.state_dict())
    with pytest.raises(ValueError, match=f"it is {two}, and the model is {one}"):
        load_checkpoint(of_torchvision(), v2.state_dict())
    # the block of an ablation without GRN has no layer scale
    with pytest.raises(ValueError, match=f"it is {one}, and the model is {two}"):
        load_checkpoint(classifier(grn="none"), v1.state_dict())
    assert_same(v2.state_dict(), before)


@pytest.mark.parametrize(
    ("version", "to", "message"),
    [
        ({}, "torchvision", r"sd is a ConvNeXt V2 \(GRN\), which torchvision does not have"),
        (V1_BLOCK, "official-sparse", r"sd is a ConvNeXt V1 \(layer scale, no GRN\), which official-sparse does not"),
    ],
)
def test_code_bases_without_a_version(version, to, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(classifier(**version).state_dict(), to)


def test_neither_or_both_or_half():
    bare = timm.models.ConvNeXt(ls_init_value=None, **SIZES).state_dict()
    with pytest.raises(ValueError, match=r"is a ConvNeXt with neither GRN nor layer scale, expected one of the two"):
        convert_state_dict(bare, "official")
    with pytest.raises(ValueError, match=r"is a ConvNeXt with neither"):
        load_checkpoint(ours(), bare)
    both = ours().state_dict() | encoder_of(classifier().double().state_dict())
    with pytest.raises(ValueError, match=r"is a ConvNeXt with both GRN and layer scale, expected one of the two"):
        convert_state_dict(both, "timm")
    with pytest.raises(ValueError, match=r"lacks parameters of a ConvNeXt with official names: stages.1.1.gamma$"):
        convert_state_dict(without(ours().state_dict(), "stages.1.1.gamma"), "timm")
    with pytest.raises(ValueError, match=r"contradict each other: stages.1.1.gamma \[8\] \(expected \[16\]\)"):
        convert_state_dict(ours().state_dict() | {"stages.1.1.gamma": torch.ones(8)}, "timm")


def test_what_a_file_records_of_grn_is_what_its_names_say(tmp_path, capsys):
    """A run of V1 records "none", which other code bases need not be told."""
    source, target = tmp_path / "source.pt", tmp_path / "target.pth"
    state = ours().state_dict()
    torch.save({"model": state, "config": {"grn": "none", "layer_scale": 1e-6}}, source)
    for make, _ in OTHERS.values():
        load_checkpoint(make(), source)
    load_checkpoint(ours(), source)
    assert cli.main(["convert", str(source), str(target), "--to", "torchvision"]) == 0
    assert f"{target}: torchvision names, {len(state)} tensors" in capsys.readouterr().out
    of_torchvision().double().load_state_dict(read_checkpoint_file(target).content)
    assert cli.main(["convert", str(source), str(tmp_path / "again.pt"), "--to", "official-sparse"]) == 1
    assert capsys.readouterr().err == (
        f"error: {source} is a ConvNeXt V1 (layer scale, no GRN), which official-sparse does not have\n"
    )
