import pytest
import safetensors.torch
import torch
from helpers.reference_models import timm, transformers
from torch import nn

from convnextv2_kernels import PatchLayout
from convnextv2_kernels.checkpoints import convert_state_dict, load_checkpoint
from convnextv2_kernels.models import ConvNeXtV2, SparseEncoder, create_model

from .samples import (
    CLASSES,
    DEPTHS,
    DIMS,
    assert_same,
    autoencoder,
    classifier,
    encoder_of,
    module_of,
    official_sparse,
    randomize,
    snapshot,
    without,
)

HEAD = ("head.weight", "head.bias")
NORM = ("norm.weight", "norm.bias")


def timm_model(**kwargs):
    config = {"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES} | kwargs
    return randomize(timm.create_model("convnextv2_atto", **config))


def transformers_model(kind, **kwargs):
    config = transformers.ConvNextV2Config(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=CLASSES, layer_norm_eps=1e-6, **kwargs
    )
    return randomize(getattr(transformers, kind)(config))


def images(side=64):
    return torch.randn(2, 3, side, side, dtype=torch.float64)


def assert_close(actual, expected):
    """float64 sums in another order; the networks are a dozen layers deep."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("conv_mlp", [False, True])
def test_timm_computes_the_same(conv_mlp):
    ours, theirs, x = classifier().double(), timm_model(conv_mlp=conv_mlp).double().eval(), images()
    report = load_checkpoint(theirs, ours.state_dict())
    assert (report.source_format, report.target_format) == ("official", "timm")
    assert len(report.loaded) == len(theirs.state_dict()) and not report.kept_initial + report.left_out
    assert_close(theirs(x), ours(x))
    again = classifier().double()
    load_checkpoint(again, theirs.state_dict())
    assert_same(again.state_dict(), ours.state_dict())


@torch.no_grad()
def test_published_size_of_timm():
    ours, x = randomize(create_model("convnextv2_atto")).double(), images()
    theirs = timm.create_model("convnextv2_atto").double().eval()
    assert len(load_checkpoint(theirs, ours.state_dict()).loaded) == 140
    assert_close(theirs(x), ours(x))


@torch.no_grad()
def test_transformers_computes_the_same():
    ours, x = classifier().double(), images()
    theirs = transformers_model("ConvNextV2ForImageClassification").double().eval()
    report = load_checkpoint(theirs, ours.state_dict())
    assert len(report.loaded) == len(theirs.state_dict()) and not report.kept_initial + report.left_out
    assert_close(theirs(x).logits, ours(x))
    again = classifier().double()
    load_checkpoint(again, theirs.state_dict())
    assert_same(again.state_dict(), ours.state_dict())


@torch.no_grad()
def test_models_without_a_head():
    ours, x = classifier().double(), images()
    pooled = ours.forward_features(x)
    headless = timm_model(num_classes=0).double().eval()
    assert load_checkpoint(headless, ours.state_dict()).left_out == HEAD
    assert_close(headless(x), pooled)
    base = transformers_model("ConvNextV2Model").double().eval()
    report = load_checkpoint(base, ours.state_dict())
    assert report.left_out == HEAD and report.target_format == "transformers base model"
    assert_close(base(x).pooler_output, pooled)
    own = ConvNeXtV2(num_classes=0, depths=DEPTHS, dims=DIMS).double()
    assert load_checkpoint(own, base.state_dict()).left_out == ()
    assert_close(own(x), pooled)
    again = classifier().double()
    assert load_checkpoint(again, headless.state_dict()).kept_initial == HEAD


@torch.no_grad()
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 1)])
def test_feature_maps_of_timm(indices):
    ours, x = classifier().double(), images()
    theirs = timm_model(features_only=True, out_indices=indices).double().eval()
    report = load_checkpoint(theirs, ours.state_dict())
    assert report.target_format == "timm features_only" and not report.kept_initial
    stages = {key.split(".")[1] for key in report.left_out if not key.startswith(("norm.", "head."))}
    assert stages == {"0", "1", "2", "3"} - set(map(str, indices)) and set(NORM + HEAD) <= set(report.left_out)
    if 3 in indices:
        assert_close(theirs(x)[-1].permute(0, 2, 3, 1), ours.run_stages(x))
        again = classifier().double()
        assert load_checkpoint(again, theirs.state_dict()).kept_initial == NORM + HEAD
        assert_close(again.run_stages(x), ours.run_stages(x))
    else:
        with pytest.raises(ValueError, match="lacks .*stages_2.downsample.0.weight"):
            load_checkpoint(classifier(), theirs.state_dict())


@torch.no_grad()
def test_backbone_of_transformers():
    ours, x = classifier().double(), images()
    theirs = transformers_model("ConvNextV2Backbone", out_features=["stage2", "stage4"]).double().eval()
    before = snapshot(theirs)
    report = load_checkpoint(theirs, ours.state_dict())
    norms = {f"hidden_states_norms.stage{stage}.{kind}" for stage in (2, 4) for kind in ("weight", "bias")}
    assert set(report.kept_initial) == norms and report.left_out == NORM + HEAD
    assert all(torch.equal(theirs.state_dict()[key], before[key]) for key in norms)
    hidden = theirs(x, output_hidden_states=True).hidden_states[-1]
    assert_close(hidden.permute(0, 2, 3, 1), ours.run_stages(x))
    narrower = transformers_model("ConvNextV2Backbone", out_features=["stage3", "stage4"]).double()
    report = load_checkpoint(narrower, theirs.state_dict())
    assert all("stage2" in key for key in report.left_out) and len(report.left_out) == 2
    assert all("stage3" in key for key in report.kept_initial) and len(report.kept_initial) == 2
    assert not any("hidden" in key for key in convert_state_dict(theirs.state_dict(), "transformers"))


@torch.no_grad()
@pytest.mark.parametrize("written", [dict, official_sparse])
def test_pretraining_into_a_classifier(written):
    """With everything visible, the sparse encoder and the dense network are the same."""
    fcmae, model, x = autoencoder().double(), classifier().double(), images()
    head = snapshot(model.head)
    report = load_checkpoint(model, written(fcmae.state_dict()))
    assert report.kept_initial == NORM + HEAD
    assert set(report.left_out) == {key for key in fcmae.state_dict() if not key.startswith("encoder.")}
    assert_same(model.head.state_dict(), head)
    features = fcmae.encode_dense(x, torch.zeros(2, 2, 2, dtype=torch.bool))
    assert_close(model.run_stages(x).permute(0, 3, 1, 2), features)


@torch.no_grad()
def test_encoders():
    ours, encoder, fcmae, x = classifier().double(), SparseEncoder(3, DEPTHS, DIMS).double(), autoencoder(), images()
    assert load_checkpoint(encoder, ours.state_dict()).left_out == NORM + HEAD
    layout = PatchLayout.from_mask(torch.zeros(2, 2, 2, dtype=torch.bool))
    assert_close(encoder(x, layout).reshape(2, 2, 2, -1), ours.run_stages(x))
    before = snapshot(fcmae)
    report = load_checkpoint(fcmae, encoder.state_dict())
    assert set(report.kept_initial) == {key for key in before if not key.startswith("encoder.")}
    after = fcmae.state_dict()
    for key, value in before.items():
        own = encoder.state_dict().get(key.removeprefix("encoder."))
        assert torch.equal(after[key], value if own is None else own.float()), key


@pytest.mark.parametrize("source", ["official", "official-sparse", "fcmae", "timm", "transformers", "mmpretrain"])
def test_foreign_modules(source):
    state = autoencoder().state_dict() if source in ("official-sparse", "fcmae") else classifier().state_dict()
    state = convert_state_dict(state, source)
    model = module_of(state)
    report = load_checkpoint(model, state)
    assert (report.source_format, report.target_format) == (source, source)
    assert set(report.loaded) == set(state)
    assert_same(model.state_dict(), state)
    copy = module_of(state)
    canonical = convert_state_dict(state, "fcmae" if "mask_token" in state else "official")
    load_checkpoint(copy, canonical)
    assert_same(copy.state_dict(), state)


@pytest.mark.parametrize(("full", "prefix"), [("official-sparse", "encoder."), ("mmpretrain", "backbone.")])
def test_encoders_of_foreign_modules(full, prefix):
    encoder = encoder_of(classifier().state_dict())
    state = {k.removeprefix(prefix): v for k, v in convert_state_dict(encoder, full).items()}
    model = module_of(state)
    load_checkpoint(model, encoder)
    assert_same(model.state_dict(), state)
    assert_same(convert_state_dict(state, "official"), encoder)


def test_wrapped_models():
    state, plain = autoencoder().state_dict(), autoencoder()
    load_checkpoint(nn.DataParallel(torch.compile(plain)), state)
    assert_same(plain.state_dict(), state)
    inner = autoencoder()
    inner.encoder = torch.compile(inner.encoder)
    assert any(key.startswith("encoder._orig_mod.") for key in load_checkpoint(inner, state).loaded)
    assert_same(convert_state_dict(inner.state_dict(), "fcmae"), state)


def test_dtype_of_the_model_stays():
    state, model = classifier().state_dict(), classifier().bfloat16()
    load_checkpoint(model, state)
    assert_same(model.state_dict(), {key: value.bfloat16() for key, value in state.items()})


def test_global_pool_free_head_of_timm():
    model = timm_model(global_pool="")
    load_checkpoint(model, state := classifier().state_dict())
    assert model.state_dict()["head.fc.weight"].shape == (CLASSES, DIMS[-1], 1, 1)
    assert_same(convert_state_dict(model.state_dict(), "official"), state)


def test_skip_head():
    source = randomize(timm.create_model("convnextv2_atto", depths=DEPTHS, dims=DIMS, num_classes=9)).state_dict()
    model = classifier()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head.weight \[9, 32\] instead of \[5, 32\].*\(skip_head=True leaves"):
        load_checkpoint(model, source)
    assert_same(model.state_dict(), before)
    report = load_checkpoint(model, source, skip_head=True)
    assert report.kept_initial == HEAD and set(report.left_out) == {"head.fc.weight", "head.fc.bias"}
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.norm.weight, source["head.norm.weight"])


def test_averaged_weights():
    raw, averaged, model = classifier().state_dict(), classifier().state_dict(), classifier()
    for name in ("model_ema", "state_dict_ema"):
        load_checkpoint(model, {"model": raw, name: averaged})
        assert_same(model.state_dict(), raw)
        load_checkpoint(model, {"model": raw, name: averaged}, use_ema=True)
        assert_same(model.state_dict(), averaged)
    with pytest.raises(ValueError, match="no averaged weights, expected model_ema or .*, got model, epoch"):
        load_checkpoint(model, {"model": raw, "epoch": 1}, use_ema=True)


def test_report_in_one_line():
    report = load_checkpoint(classifier(), autoencoder().state_dict())
    assert str(report) == (
        f"loaded {len(report.loaded)} tensors (fcmae -> official); kept initial: norm.weight, norm.bias, head.weight, "
        f"head.bias; left out: {', '.join(report.left_out[:8])} and {len(report.left_out) - 8} more"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "head.bias"), "lacks .* names: head.bias$"),
        (lambda s: without(s, "stages.3.0.grn.beta", "norm.weight"), "lacks .*: stages.3.0.grn.beta, norm.weight"),
        (lambda s: s | {"extra": torch.ones(1)}, "official names: extra$"),
        (lambda s: s | {k: s[k].long() for k in ("norm.bias", "head.bias")}, "norm.bias is .*, head.bias is .*int64"),
        (
            lambda s: s | {"stages.0.0.pwconv1.weight": torch.ones(8, 32), "head.bias": torch.ones(4)},
            r": stages.0.0.pwconv1.weight \[8, 32\] instead of \[32, 8\], head.bias \[4\] instead of \[5\]$",
        ),
        (
            lambda s: s | {k.replace("stages.0.0.", "stages.0.1."): v for k, v in s.items()},
            r"the model has no place for stages.0.1.dwconv.weight, .* and 2 more$",
        ),
        (
            lambda s: without(s, "stages.1.1."),
            "does not fit the model: it lacks stages.1.1.dwconv.weight, .* and 2 more$",
        ),
        (lambda s: {}, "nothing at all"),
    ],
)
def test_an_error_leaves_the_model_untouched(change, message):
    model = classifier()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, change(dict(classifier().state_dict())))
    assert_same(model.state_dict(), before)


def test_models_it_cannot_load_into():
    state = classifier().state_dict()
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got OrderedDict"):
        load_checkpoint(state, state)
    with pytest.raises(TypeError, match="path_or_state_dict must be a path or a state_dict, got int"):
        load_checkpoint(classifier(), 3)
    with pytest.raises(ValueError, match="model is no ConvNeXt, .* got weight, bias$"):
        load_checkpoint(nn.Linear(1, 1), state)
    with pytest.raises(ValueError, match="model must hold .* on the meta device, without values"):
        load_checkpoint(classifier().to("meta"), state)
    with pytest.raises(ValueError, match="model has keys .* timm names: norm_pre.weight, norm_pre.bias$"):
        load_checkpoint(timm_model(head_norm_first=True), state)


def test_a_parameter_that_cannot_be_written_leaves_the_model_untouched():
    """Found only when its turn comes: what was written before is put back."""
    model = classifier()
    model.head.weight = nn.Parameter(torch.zeros(1, DIMS[-1]).expand(CLASSES, DIMS[-1]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="the model's head.weight cannot be written: "):
        load_checkpoint(model, classifier().state_dict())
    assert_same(model.state_dict(), before)


def test_average_of_torch_itself():
    model = classifier()
    average = torch.optim.swa_utils.AveragedModel(model)
    target = torch.optim.swa_utils.AveragedModel(classifier())
    load_checkpoint(target, average.state_dict())
    assert_same(target.module.state_dict(), model.state_dict())


def behind(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "encoder.", "student.", "a.b.c.", "model.encoder."])
@pytest.mark.parametrize("source", ["official", "timm", "transformers", "mmpretrain"])
def test_networks_in_larger_modules(source, prefix):
    state, model = classifier().state_dict(), classifier()
    report = load_checkpoint(model, {"state_dict": behind(prefix, convert_state_dict(state, source))})
    assert_same(model.state_dict(), state)
    assert (report.source_format, report.prefix) == (source, prefix)
    assert f"({source} behind {prefix} -> official)" in str(report)


@pytest.mark.parametrize("prefix", ["model.", "net.", "encoder."])
@pytest.mark.parametrize("source", ["fcmae", "official-sparse"])
def test_autoencoders_in_larger_modules(source, prefix):
    state, model = autoencoder().state_dict(), autoencoder()
    report = load_checkpoint(model, behind(prefix, convert_state_dict(state, source)))
    assert_same(model.state_dict(), state)
    assert (report.source_format, report.prefix) == (source, prefix)


def test_prefixes_mixed_with_wrappers():
    state, model = classifier().state_dict(), classifier()
    wrapped = {key.replace("stages.", "stages._orig_mod."): value for key, value in state.items()}
    content = {"module": {"state_dict": behind("_orig_mod.model.module.net.", wrapped)}}
    assert load_checkpoint(model, content).prefix == "model.net."
    assert_same(model.state_dict(), state)
    assert_same(convert_state_dict(content, "official"), state)


def test_the_rest_of_a_larger_module_is_reported():
    state, model = classifier().state_dict(), classifier()
    rest = {"criterion.weight": torch.ones(3), "accuracy.total": torch.tensor(3)}
    report = load_checkpoint(model, behind("model.", state) | rest)
    assert report.left_out == ("criterion.weight", "accuracy.total")
    with pytest.raises(ValueError, match="keys that are not of a ConvNeXt with official names: model.extra$"):
        load_checkpoint(model, behind("model.", state | {"extra": torch.ones(1)}))
    larger = nn.ModuleDict({"net": classifier(), "criterion": nn.Linear(1, 1)})
    report = load_checkpoint(larger, state)
    assert report.kept_initial == ("criterion.weight", "criterion.bias")
    assert_same(larger["net"].state_dict(), state)


def test_several_networks_are_told_by_their_prefixes():
    state, model = classifier().state_dict(), classifier()
    for content, names in (
        (behind("student.", state) | behind("teacher.", state), "their keys begin with student., teacher."),
        (behind("ema.", state) | state, "their keys begin with ema., no prefix"),
        ({"student": state, "teacher": state}, "student, teacher"),
    ):
        with pytest.raises(ValueError, match=f"holds several networks, expected one: {names}$"):
            load_checkpoint(model, content)
    load_checkpoint(model, {"student": state, "epoch": 1})
    with pytest.raises(ValueError, match="holds averaged weights only, under state_dict_ema: ask for these"):
        load_checkpoint(model, {"state_dict_ema": state})


def test_another_size_is_told_by_name():
    model = create_model("convnextv2_femto")
    with pytest.raises(
        ValueError,
        match=r"^path_or_state_dict does not fit the model: it is convnextv2_atto, and the model is convnextv2_femto$",
    ):
        load_checkpoint(model, create_model("convnextv2_atto").state_dict())


@pytest.mark.parametrize("record", ["metadata", "config", "mapping"])
def test_another_grn_is_refused(tmp_path, record):
    """Names and shapes are the same: only what the file says of its training tells them apart."""
    state = classifier().state_dict()

    def recorded(grn):
        if record == "mapping":
            return {"model": state, "config": {"grn": grn}}
        path = tmp_path / "a"
        if record == "metadata":
            safetensors.torch.save_file(state, path, {"grn": grn})
        else:
            torch.save({"model": state, "config": {"grn": grn}}, path)
        return path

    mean = ConvNeXtV2(num_classes=CLASSES, depths=DEPTHS, dims=DIMS, grn="mean")
    load_checkpoint(mean, recorded("mean, skip"))
    load_checkpoint(classifier(), recorded("default"))
    load_checkpoint(timm_model(), recorded("default"))
    for model, grn, has in (
        (classifier(), "mean", "default"),
        (mean, "default", "mean"),
        (timm_model(), "l1", "default"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"was trained with the GRN '{grn}', and the model has '{has}'"):
            load_checkpoint(model, recorded(grn))
        assert_same(model.state_dict(), before)
    with pytest.raises(ValueError, match="records an unknown GRN, 'median'"):
        load_checkpoint(mean, recorded("median"))


def test_a_trained_grn_is_not_lost_in_a_model_without_one():
    """Neither names nor shapes differ, and the model would ignore the values."""
    settings = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "num_classes": 3}
    given = ConvNeXtV2(**settings).state_dict()
    model, image = ConvNeXtV2(**settings, grn="none").eval(), torch.randn(1, 3, 32, 32)
    load_checkpoint(model, given)  # its GRN is zero
    before = model(image)
    trained = {name: tensor + 1 if "stages.2.0.grn.beta" in name else tensor + 0.1 for name, tensor in given.items()}
    with pytest.raises(ValueError, match="it was trained with GRN .*stages.2.0.grn.beta.*, and the model has none"):
        load_checkpoint(model, trained)
    assert torch.equal(model(image), before)
    meta = {name: tensor.to("meta") for name, tensor in given.items()}
    with pytest.raises(ValueError, match="meta"):
        load_checkpoint(model, meta)
