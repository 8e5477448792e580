import itertools
import re

import pytest
import torch
from helpers.reference_models import timm
from timm.models.convnext import checkpoint_filter_fn

from convnextv2_kernels.checkpoints import convert_state_dict
from convnextv2_kernels.models import CONFIGS, ConvNeXtV2

from .samples import (
    DENSE,
    WRITABLE,
    assert_same,
    autoencoder,
    classifier,
    encoder_of,
    module_of,
    official_sparse,
    without,
)

DECODER = ("mask_token", "proj.", "pred.", "decoder.")


def states():
    """The same encoder in every format, with a norm and a head in the dense ones and a decoder in the others."""
    official, fcmae = classifier().state_dict(), autoencoder().state_dict()
    fcmae.update({f"encoder.{key}": value for key, value in encoder_of(official).items()})
    known = {to: convert_state_dict(official, to) for to in DENSE}
    return known | {"fcmae": fcmae, "official-sparse": official_sparse(fcmae)}


def test_round_trip_through_the_dense_formats():
    official = classifier().state_dict()
    there = convert_state_dict(convert_state_dict(official, "timm"), "transformers")
    assert_same(convert_state_dict(there, "official"), official)
    assert_same(convert_state_dict(convert_state_dict(there, "mmpretrain"), "official"), official)


def test_round_trip_through_the_autoencoders_keeps_the_decoder():
    fcmae = autoencoder().state_dict()
    sparse = convert_state_dict(fcmae, "official-sparse")
    assert_same(sparse, official_sparse(fcmae))
    assert {"mask_token", "proj.bias", "pred.weight", "decoder.1.grn.gamma"} <= set(sparse)
    assert_same(convert_state_dict(sparse, "fcmae"), fcmae)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(WRITABLE, 2)))
def test_every_pair_agrees_on_what_both_can_hold(first, second):
    known = states()
    if (first in DENSE) == (second in DENSE):
        expected = known[second]
    elif second in DENSE:
        expected = convert_state_dict(encoder_of(known["official"]), second)
    else:
        expected = {key: value for key, value in known[second].items() if not key.startswith(DECODER)}
    converted = convert_state_dict(known[first], second)
    assert_same(converted, expected)
    assert all(value.is_contiguous() for value in converted.values())


@pytest.mark.parametrize("to", WRITABLE)
def test_idempotent(to):
    state = states()[to]
    assert_same(convert_state_dict(state, to), state)


def test_kernel_order():
    """Offset kw * K + kh: here the value at (kh, kw) of the dense kernel is 100 kh + kw."""
    sparse = official_sparse(autoencoder().state_dict())
    offsets = torch.arange(49)
    sparse["encoder.stages.0.0.dwconv.kernel"] = (100.0 * (offsets % 7) + offsets // 7)[:, None].repeat(1, 8)
    channels = 1000.0 * torch.arange(8)[:, None] + 10000.0 * torch.arange(16)
    sparse["encoder.downsample_layers.1.1.kernel"] = torch.tensor([0.0, 100.0, 1.0, 101.0])[:, None, None] + channels
    dense = convert_state_dict(sparse, "official")
    kh, kw = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    assert torch.equal(dense["stages.0.0.dwconv.weight"], (100.0 * kh + kw).expand(8, 1, 7, 7))
    weight = dense["downsample_layers.1.1.weight"]
    assert weight.shape == (16, 8, 2, 2)
    assert weight[3, 5, 1, 0] == 35100 and weight[3, 5, 0, 1] == 35001


def test_encoder_only_files_of_the_official_code():
    """Dense names, GRN of either rank, no norm and no head."""
    encoder = encoder_of(classifier().state_dict())
    flat = {key: value.reshape(1, -1) if ".grn." in key else value for key, value in encoder.items()}
    assert_same(convert_state_dict(flat, "official"), encoder)
    assert_same(convert_state_dict(convert_state_dict(flat, "timm"), "official"), encoder)


@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"])
def test_pointwise_layers_as_timm_builds_them(size):
    config = {"depths": (1, 1, 1, 1), "dims": (CONFIGS[f"convnextv2_{size}"].dims[0], 4, 4, 4), "num_classes": 2}
    model = timm.create_model(f"convnextv2_{size}", **config)
    converted = convert_state_dict(ConvNeXtV2(**config).state_dict(), "timm")
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_timm_agrees_with_its_own_reader(conv_mlp):
    official = classifier().state_dict()
    ours = convert_state_dict(official, "timm", conv_mlp=conv_mlp)
    assert_same(checkpoint_filter_fn({"model": official}, module_of(ours)), ours)
    assert_same(convert_state_dict(ours, "timm"), ours)  # keeps the kind it has


def test_dtype_is_kept():
    state = {key: value.bfloat16() for key, value in autoencoder().state_dict().items()}
    assert_same(convert_state_dict(convert_state_dict(state, "official-sparse"), "fcmae"), state)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_wrappers_and_prefixes_are_taken_off(wrapper):
    state = autoencoder().state_dict()
    wrapped = {f"module._orig_mod.{k.replace('encoder.', 'encoder._orig_mod.module.')}": v for k, v in state.items()}
    assert_same(convert_state_dict({wrapper: wrapped, "epoch": 3}, "fcmae"), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, r"sd is no ConvNeXt, expected names as in official, .*, got nothing at all"),
        (lambda s: {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}, r"got conv1.weight, fc.bias$"),
        (lambda s: s | {"stages.0.0.gamma": torch.ones(8)}, r"a ConvNeXt with both GRN and layer scale, expected one"),
        (lambda s: s | {f"x{i}": torch.ones(1) for i in range(11)}, r"x6, x7 and 3 more$"),
        (lambda s: s | {7: torch.ones(1)}, r"official names: 7$"),
        (lambda s: s | {"mask_token": torch.ones(1, 4, 1, 1)}, r"mask_token"),
        (lambda s: without(s, "stages.0.0.grn.gamma", "norm.bias"), r"lacks .*: stages.0.0.grn.gamma, norm.bias"),
        (lambda s: without(s, "head.bias"), r"lacks .*: head.bias"),
        (lambda s: without(s, "norm.weight", "norm.bias"), r"lacks .*: norm.weight, norm.bias"),
        (lambda s: without(s, "stages.1.0."), r"lacks .*: stages.1.0.dwconv.weight, .* and 2 more$"),
        (lambda s: without(s, "stages.3.", "downsample_layers.3."), r"lacks .*stages.3.0.dwconv.weight"),
        (lambda s: {k.replace("stages.1.1.", "stages.1.7."): v for k, v in s.items()}, r"lacks .*: stages.1.1."),
        (lambda s: s | {"module.norm.bias": s["norm.bias"]}, r"both with and without module. or _orig_mod.: norm.bias"),
        (lambda s: s | {"norm.bias": 1.0}, r"dense floating-point tensors, but norm.bias is a float$"),
        (lambda s: s | {"norm.bias": torch.ones(32, dtype=torch.int64)}, r"norm.bias is of dtype torch.int64"),
        (lambda s: s | {"norm.bias": torch.ones(32).to_sparse()}, r"norm.bias is of layout torch.sparse_coo"),
        (lambda s: s | {"norm.bias": torch.ones(32, device="meta")}, r"norm.bias is on the meta device"),
        (lambda s: s | {"head.weight": torch.ones(160)}, r"shapes that no ConvNeXt has: head.weight \[160\]"),
        (lambda s: s | {"stages.0.0.grn.beta": torch.ones(4, 8)}, r"shapes .*: stages.0.0.grn.beta \[4, 8\]"),
        (lambda s: s | {"stages.0.0.dwconv.weight": torch.ones(48, 8)}, r"shapes .*dwconv.weight \[48, 8\]"),
    ],
)
def test_what_is_no_convnextv2(change, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(change(dict(classifier().state_dict())), "timm")


def test_half_a_decoder():
    with pytest.raises(ValueError, match=r"lacks .*fcmae names: mask_token, decoder.0.norm.bias"):
        convert_state_dict(without(autoencoder().state_dict(), "mask_token", "decoder.0.norm.bias"), "fcmae")


def test_arguments():
    state = classifier().state_dict()
    with pytest.raises(ValueError, match="to must be one of official, .*, got 'timm features_only'"):
        convert_state_dict(state, "timm features_only")
    with pytest.raises(ValueError, match="conv_mlp is for to='timm' only, got conv_mlp=True with to='official'"):
        convert_state_dict(state, "official", conv_mlp=True)
    with pytest.raises(TypeError, match="sd must be a state_dict, got ConvNeXtV2"):
        convert_state_dict(classifier(), "official")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.downsample_layers.0.0.weight", (8, 3, 4, 5)),
        ("encoder.downsample_layers.0.1.weight", (9,)),
        ("encoder.downsample_layers.2.0.bias", (24,)),
        ("encoder.downsample_layers.2.1.weight", (24, 8, 2, 2)),
        ("encoder.downsample_layers.2.1.bias", (16,)),
        ("encoder.stages.1.0.dwconv.weight", (16, 2, 7, 7)),
        ("encoder.stages.1.1.dwconv.weight", (16, 1, 5, 5)),
        ("encoder.stages.1.1.dwconv.bias", (8,)),
        ("encoder.stages.1.1.norm.weight", (8,)),
        ("encoder.stages.1.1.pwconv1.weight", (48, 16)),
        ("encoder.stages.1.1.pwconv1.bias", (48,)),
        ("encoder.stages.1.1.grn.gamma", (1, 1, 1, 16)),
        ("encoder.stages.1.1.pwconv2.weight", (16, 48)),
        ("encoder.stages.1.1.pwconv2.bias", (64,)),
        ("decoder.1.dwconv.weight", (13, 1, 7, 7)),
        ("decoder.1.grn.beta", (1, 1, 1, 12)),
        ("proj.weight", (12, 24, 1, 1)),
        ("proj.bias", (32,)),
        ("mask_token", (1, 32, 1, 1)),
        ("pred.weight", (3072, 32, 1, 1)),
        ("pred.bias", (3,)),
    ],
)
def test_shapes_that_contradict_each_other(name, shape):
    state = autoencoder().state_dict()
    expected = re.escape(str(list(state[name].shape)))
    if name.endswith("0.0.weight"):
        expected = r"\[8, 3, 5, 5\]"
    with pytest.raises(ValueError, match=rf"shapes that contradict each other: {name} .* \(expected {expected}\)"):
        convert_state_dict({**state, name: torch.ones(shape)}, "fcmae")


@pytest.mark.parametrize(("name", "shape"), [("head.weight", (5, 24)), ("head.bias", (6,)), ("norm.bias", (24,))])
def test_heads_that_contradict_the_encoder(name, shape):
    state = classifier().state_dict()
    with pytest.raises(ValueError, match=rf"contradict each other: {name} .* \(expected "):
        convert_state_dict({**state, name: torch.ones(shape)}, "official")


def test_a_grn_that_others_lack():
    """Other code bases would compute something else with the same weights."""
    content = {"model": classifier().state_dict(), "config": {"grn": "l1"}}
    assert_same(convert_state_dict(content, "official"), content["model"])
    for to in ("timm", "transformers", "mmpretrain", "official-sparse"):
        with pytest.raises(ValueError, match=f"sd was trained with the GRN 'l1', which {to} does not have"):
            convert_state_dict(content, to)
