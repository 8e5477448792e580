"""Blocks that are fused, blocks that are not and why; undoing it leaves nothing behind."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.official import Block
from helpers.reference_models import timm, transformers
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import convnextv2_kernels as ck

from .networks import close, official_model, output_of, randomized, results_of, small_timm_model, transformers_model

MAKERS = {"timm": small_timm_model, "transformers": transformers_model, "official": official_model}
IMAGES = (2, 3, 64, 48)


def state_of(model: nn.Module) -> dict:
    """Everything Python sees of a model's modules: class, attributes by identity."""
    return {name: (type(m), {k: id(v) for k, v in vars(m).items()}) for name, m in model.named_modules()}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fuse_and_unfuse_restore_everything(make):
    model, images = make(), torch.randn(IMAGES)
    cotangent = torch.randn(IMAGES[0], 10)
    before, names, parameters = state_of(model), list(model.state_dict()), [id(p) for p in model.parameters()]
    expected = results_of(model, images, cotangent)
    report = ck.fuse(model)
    assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == parameters
    assert {name: kind for name, (kind, _) in state_of(model).items()} == {n: kind for n, (kind, _) in before.items()}
    assert ck.unfuse(model) == len(report.replaced) > 0
    assert state_of(model) == before
    assert all(torch.equal(value, expected[key]) for key, value in results_of(model, images, cotangent).items())
    assert ck.unfuse(model) == 0


def test_report():
    model = small_timm_model(kernel_sizes=(7, 7, 7, 13))
    report = ck.fuse(model)
    assert [r.name for r in report.replaced] == [f"stages.{s}.blocks.{b}" for s, b in ((0, 0), (1, 0), (2, 0), (2, 1))]
    assert {r.kind for r in report.replaced} == {"timm ConvNeXtBlock"}
    reason = "conv_dw has a kernel of 13x13, expected an odd square from 3 to 11"
    assert report.skipped == (("stages.3.blocks.0", reason),)
    expected = [
        "fused 4 of 5 blocks of ConvNeXt",
        "  timm ConvNeXtBlock: stages.0.blocks.0, stages.1.blocks.0, stages.2.blocks.0, stages.2.blocks.1",
        f"  not fused: {reason}: stages.3.blocks.0",
        f"  served by: {report.backend}",
    ]
    assert str(report).splitlines() == expected
    again = ck.fuse(model)
    assert not again.replaced and len(again.already_fused) == 4
    assert "fused already: stages.0.blocks.0, " in str(again)


def test_report_names_the_backend():
    model = small_timm_model()
    with ck.use_backend("reference"):
        assert ck.fuse(model).backend.startswith("reference, plain PyTorch, not faster (float32 on cpu")
    with ck.use_backend("triton"):
        assert ck.fuse(small_timm_model()).backend.startswith("nothing: fuse was asked of backend 'triton', but ")
    assert ck.fuse(small_timm_model().half()).backend.startswith("reference, plain PyTorch, not faster (float16 on cpu")
    with torch.device("meta"):
        absent = nn.Sequential(Block(8))
    assert ck.fuse(absent).backend == "decided when the model leaves the meta device"


SKIPPED = {
    "ConvNeXt V1 block (no GRN)": {"use_grn": False},
    "conv_dw has dilation 2, expected 1": {"output_stride": 16},
    "norm is a RmsNorm2d, expected LayerNorm": {"norm_layer": "rmsnorm"},
    "mlp.act is a SiLU, expected the erf or the tanh GELU": {"act_layer": "silu"},
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_what_has_no_fused_form_is_left_alone(reason):
    model = small_timm_model(**SKIPPED[reason])
    images = torch.randn(IMAGES)
    expected = model(images)
    report = ck.fuse(model, strict=False)
    assert {s.reason for s in report.skipped} == {reason}
    close(model(images), expected)
    if not report.replaced:
        assert torch.equal(model(images), expected)


def change(path: str, new) -> None:
    def apply(block):
        *parents, last = path.split(".")
        owner = block
        for name in parents:
            owner = getattr(owner, name)
        setattr(owner, last, new(getattr(owner, last)) if callable(new) else new)

    return apply


def linear_subclass(old: nn.Module) -> nn.Module:
    old.__class__ = type("LoRALinear", (nn.Linear,), {})
    return old


def without_bias(old: nn.Module) -> nn.Module:
    old.bias = None
    return old


CHANGES = {
    "mlp.fc1 is a LoRALinear, expected torch.nn.Linear or Conv2d": change("mlp.fc1", linear_subclass),
    "mlp.fc2 has no bias": change("mlp.fc2", without_bias),
    "mlp.drop1 drops out with rate 0.1, expected 0": change("mlp.drop1.p", 0.1),
    "shortcut is a Conv2d, expected the identity": change("shortcut", lambda _: nn.Conv2d(16, 16, 1)),
    "conv_dw has stride 2, expected 1": change("conv_dw.stride", (2, 2)),
    "conv_dw has padding (3, 3) (reflect), expected 3 zeros": change("conv_dw.padding_mode", "reflect"),
    "norm is a GroupNorm, expected LayerNorm": change("norm", lambda _: nn.GroupNorm(1, 16)),
    "drop_path is a Dropout, expected DropPath or the identity": change("drop_path", lambda _: nn.Dropout(0.5)),
    "its forward has been replaced on the instance": change("forward", lambda old: old),
    "the forward of mlp.fc1 has been replaced on the instance": change("mlp.fc1.forward", lambda old: old),
    "norm is torch.float32 beside torch.float64 of conv_dw, expected one dtype": lambda block: (
        block.double().norm.float()
    ),
    "a hook on mlp.act would not run": lambda block: block.mlp.act.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_block_is_skipped(reason):
    model = small_timm_model(conv_mlp=False)
    CHANGES[reason](model.stages[0].blocks[0])
    report = ck.fuse(model)
    assert report.skipped == (("stages.0.blocks.0", reason),) and len(report.replaced) == 4


def test_a_subclass_with_another_forward_is_skipped():
    block = timm.models.convnext.ConvNeXtBlock(8, use_grn=True, ls_init_value=None)
    base = type(block)
    block.__class__ = type("Mine", (base,), {"forward": lambda self, x: base.forward(self, x) * 2})
    report = ck.fuse(block, strict=False)
    assert report.skipped == (("", "Mine overrides forward of ConvNeXtBlock"),)
    assert "the model itself" in str(report)
    block.__class__ = type("Same", (base,), {})
    assert ck.fuse(block).replaced


class Doubled(Block):
    def forward(self, x):
        return 2 * super().forward(x)


class Failing(Block):
    def forward(self, x):
        raise RuntimeError("needs a mask")


class Dropping(Block):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


def with_buffer() -> Block:
    block = Block(8)
    block.register_buffer("scale", torch.ones(1))
    return block


def with_another_norm(norm: nn.Module) -> Block:
    block = Block(8)
    block.norm = norm
    return block


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Doubled(8), "a trial run of its forward gave other numbers than a ConvNeXt V2 block"),
        (Block(8, mean_eps=1e-5), "a trial run of its forward gave other numbers than a ConvNeXt V2 block"),
        (Failing(8), "a trial run of its forward failed (RuntimeError: needs a mask)"),
        (Dropping(8), "a trial run of its forward gave other numbers than a ConvNeXt V2 block"),
        (with_buffer(), "it has parameters or buffers besides those of a ConvNeXt V2 block"),
        (with_another_norm(nn.Identity()), "norm.weight is None, expected 8 elements"),
        (with_another_norm(nn.RMSNorm(8, eps=1e-6)), "norm.bias is None, expected 8 elements"),
    ],
    ids=["doubled", "eps", "failing", "dropping", "buffer", "identity", "rms"],
)
def test_the_trial_run_tells_lookalikes_apart(block, reason):
    model = nn.Sequential(block, Block(8)).train()
    before = state_of(model)
    rng = torch.get_rng_state()
    report = ck.fuse(model)
    assert report.skipped == (("0", reason),) and [r.name for r in report.replaced] == ["1"]
    ck.unfuse(model)
    assert state_of(model) == before and torch.equal(torch.get_rng_state(), rng)


def test_a_class_patched_before_fusing_is_skipped(monkeypatch):
    model = small_timm_model()
    kind = type(model.stages[0].blocks[0])
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    report = ck.fuse(model, strict=False)
    assert {s.reason for s in report.skipped} == {"forward of ConvNeXtBlock has been replaced"}


def test_this_librarys_models_are_fused_by_nature():
    model = ck.models.ConvNeXtV2(3, 10, (1, 1, 1, 1), (4, 4, 4, 8))
    report = ck.fuse(model)
    assert len(report.already_fused) == 4 and not report.replaced and not report.skipped
    assert ck.unfuse(model) == 0


class OfficialV1(nn.Module):
    """The children of the official code's ConvNeXt V1 block."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = nn.Identity()


def transformers_v1() -> nn.Module:
    config = transformers.ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 8, 8, 8])
    return transformers.ConvNextModel(config)


def torchvision_v1() -> nn.Module:
    setting = [CNBlockConfig(8, 8, 2), CNBlockConfig(8, None, 3)]
    return ConvNeXt(setting)


V1 = {
    "found 5 ConvNeXt V1 blocks (layer scale, no GRN), not fused: stages.0.blocks.0, ": (
        lambda: small_timm_model(use_grn=False, ls_init_value=1e-6)
    ),
    "found 5 ConvNeXt V1 blocks (no GRN), not fused: stages.0.blocks.0, ": lambda: small_timm_model(use_grn=False),
    "found 5 ConvNeXt V1 blocks (layer scale, no GRN), not fused: encoder.stages.0.layers.0, ": transformers_v1,
    "found 5 ConvNeXt V1 blocks (layer scale, no GRN), not fused: features.1.0, ": torchvision_v1,
    "found 1 ConvNeXt V1 block (layer scale, no GRN), not fused: 0": lambda: nn.Sequential(OfficialV1(8)),
}


@pytest.mark.parametrize("found", V1)
def test_v1_blocks_are_counted(found):
    model = V1[found]()
    with pytest.raises(ValueError, match=re.escape(f"in which no block can be fused: {found}")):
        ck.fuse(model)
    assert f"\n  {found}" in str(ck.fuse(model, strict=False))


def test_nothing_to_fuse():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3))
    found = (
        "found none of timm ConvNeXtBlock, transformers ConvNextV2Layer, official Block and this library's "
        "ConvNeXtV2Block"
    )
    expected = f"model is a Sequential in which no block can be fused: {found} (strict=False accepts it)"
    with pytest.raises(ValueError, match=re.escape(expected)):
        ck.fuse(plain)
    assert str(ck.fuse(plain, strict=False)) == f"fused 0 of 0 blocks of Sequential\n  {found}"
    for call in (ck.fuse, ck.unfuse):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
            call({})


def test_fusing_again_reports_what_runs_unfused():
    model = small_timm_model()
    ck.fuse(model, save="inputs")
    changed = model.stages[2].blocks[1]
    handle = changed.mlp.act.register_forward_hook(lambda *_: None)
    model.stages[0].blocks[0].mlp.drop1.p = 0.5
    before = "fused before, but it has changed and runs unfused now: "
    report = ck.fuse(model, save="hidden")
    assert report.skipped == (
        ("stages.0.blocks.0", f"{before}mlp.drop1 drops out with rate 0.5, expected 0"),
        ("stages.2.blocks.1", f"{before}a hook on mlp.act would not run"),
    )
    assert report.already_fused == ("stages.1.blocks.0", "stages.2.blocks.0", "stages.3.blocks.0")
    assert str(report).startswith("fused 0 of 5 blocks of ConvNeXt\n") and changed.forward.save == "hidden"
    handle.remove()
    assert len(ck.fuse(model).already_fused) == 4
    assert ck.unfuse(model) == 5
    with pytest.raises(ValueError, match="no block can be fused: not fused: fused before, but it has changed and"):
        block = nn.Sequential(changed)
        ck.fuse(block)
        changed.mlp.drop1.p = 0.5
        ck.fuse(block)


def test_layers_of_peft_are_named():
    """Its LoRA layers are called Linear and Conv2d, as PyTorch's."""
    lora = type("Linear", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})
    model = small_timm_model()
    ck.fuse(model)
    model.stages[0].blocks[0].mlp.fc1 = lora()
    reason = (
        "mlp.fc1 is peft.tuners.lora.layer.Linear, a layer of peft that the fused block would not run, expected "
        "torch.nn.Linear or Conv2d (peft's merge_and_unload restores it)"
    )
    assert ck.fuse(model).skipped[0].reason.endswith(f"runs unfused now: {reason}")
    ck.unfuse(model)
    assert ck.fuse(model).skipped == (("stages.0.blocks.0", reason),)
    model.stages[1].blocks[0].mlp.fc1 = type("Linear", (nn.Module,), {"__module__": "other.layers"})()
    ck.unfuse(model)
    assert ck.fuse(model).skipped[1].reason == "mlp.fc1 is other.layers.Linear, expected torch.nn.Linear or Conv2d"


def test_context_manager():
    model, images = small_timm_model(), torch.randn(IMAGES)
    before = state_of(model)
    expected = model(images)
    with ck.fused(model) as report:
        assert len(report.replaced) == 5
        close(model(images), expected)
        with ck.fused(model) as inner:
            assert len(inner.already_fused) == 5
        assert len(ck.fuse(model).already_fused) == 5
    assert state_of(model) == before
    with pytest.raises(KeyError), ck.fused(model):
        raise KeyError
    assert state_of(model) == before
    ck.fuse(model)
    with ck.fused(model):
        pass
    assert ck.unfuse(model) == 5


def test_later_changes_inside_a_block_are_honoured():
    """A hook or a new layer added after fusing: the block runs its own forward, and warns once."""
    model, images = small_timm_model(), torch.randn(IMAGES)
    expected = model(images)
    ck.fuse(model)
    seen = []
    handle = model.stages[0].blocks[0].mlp.act.register_forward_hook(lambda *_: seen.append(True))
    with pytest.warns(UserWarning, match="ConvNeXtBlock has changed and runs unfused .a hook on mlp.act would"):
        close(model(images), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        assert len(seen) == 2
        handle.remove()
        model(images)
        assert len(seen) == 2
    model.stages[1].blocks[0].mlp.fc1 = randomized(nn.utils.parametrizations.weight_norm(nn.Conv2d(24, 96, 1)), 7)
    with pytest.warns(UserWarning, match="mlp.fc1 is a ParametrizedConv2d, expected"):
        changed = model(images)
    ck.unfuse(model)
    close(changed, model(images))


LATER = {
    "conv_dw has dilation 2": lambda block: (
        change("conv_dw.dilation", (2, 2))(block),
        change("conv_dw.padding", (6, 6))(block),
    ),
    "mlp.drop1 drops out with rate 0.5": change("mlp.drop1.p", 0.5),
    "mlp.fc2 has no bias": change("mlp.fc2", without_bias),
    "the forward of mlp.fc1 has been replaced": lambda block: change(
        "mlp.fc1.forward", lambda old: lambda x: 3 * old(x)
    )(block),
}


@pytest.mark.parametrize("reason", LATER)
def test_later_changes_of_a_layer_are_honoured(reason):
    model, images = small_timm_model().train(), torch.randn(IMAGES)
    ck.fuse(model)
    LATER[reason](model.stages[0].blocks[0])
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        if not results:
            with pytest.warns(UserWarning, match=reason):
                results.append(model(images))
            ck.unfuse(model)
        else:
            results.append(model(images))
    close(*results)


def test_parameters_are_read_at_each_call():
    model, images = small_timm_model(), torch.randn(IMAGES)
    ck.fuse(model)
    randomized(model, 5)
    model.stages[0].blocks[0].mlp.grn.weight = nn.Parameter(torch.randn(64))
    got = output_of(model, images)
    ck.unfuse(model)
    close(got, model(images))


def test_other_ways_to_call_a_block():
    """By keyword, on the meta device, and with more than a map, as the block's own forward takes it."""
    layer = transformers_model().convnextv2.encoder.stages[0].layers[0]
    x = torch.randn(2, 16, 5, 4)
    expected = layer(features=x)
    ck.fuse(layer)
    close(layer(features=x), expected)
    with pytest.raises(TypeError, match="forward\\(\\)"):
        layer(x, x)
    assert layer.to("meta")(x.to("meta")).is_meta


def test_a_forward_without_its_block_says_so():
    block = small_timm_model().stages[0].blocks[0]
    ck.fuse(block)
    forward = block.forward
    del block
    with pytest.raises(RuntimeError, match="the block of this fused forward is gone"):
        forward(torch.randn(2, 16, 5, 4))


def test_nothing_foreign_is_imported():
    """Fusing needs neither timm nor transformers."""
    code = (
        "import sys, torch, convnextv2_kernels as ck; ck.fuse(torch.nn.Linear(1, 1), strict=False);"
        "sys.exit(bool({'timm', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
