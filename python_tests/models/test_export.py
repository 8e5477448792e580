"""This library's models as ONNX, TorchScript and torch.export programs: other batches and other masks than exported."""

import io
import warnings

import pytest
import torch
from fuse.networks import randomized
from helpers.exported import assert_runs_as, flat, onnx_session, onnxruntime
from torch import nn

import convnextv2_kernels as ck

SIZES = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
# the Dynamo exporter takes seconds for each
THOROUGH_EXPORTERS = pytest.mark.parametrize(
    "dynamo", [pytest.param(True, marks=pytest.mark.thorough), False], ids=["dynamo", "torchscript"]
)


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 64, 96)


def mask(n: int) -> torch.Tensor:
    """Any numbers of visible patches; the first image has none."""
    hidden = torch.rand(n, 2, 3) < 0.5
    hidden[0] = True
    hidden[-1, 0, 0] = False
    return hidden


def dense(n: int):
    return (images(n),)


def masked(n: int):
    return images(n), mask(n)


MODELS = {
    "classifier": (lambda: ck.models.ConvNeXtV2(num_classes=10, **SIZES), dense),
    "features": (lambda: ck.models.ConvNeXtV2Features(**SIZES), dense),
    "encoder": (lambda: ck.models.SparseEncoder(3, **SIZES), dense),
    "masked encoder": (lambda: ck.models.SparseEncoder(3, **SIZES), masked),
    "batch scope": (lambda: ck.models.SparseEncoder(3, **SIZES, grn_scope="batch"), masked),
    "GRN variant": (lambda: ck.models.SparseEncoder(3, **SIZES, grn="l1"), masked),
    "FCMAE": (lambda: ck.models.FCMAE(**SIZES, decoder_embed_dim=16), masked),
    "masked dense FCMAE": (lambda: ck.models.FCMAE(**SIZES, decoder_embed_dim=16, encoding="masked_dense"), masked),
}
SHORT = ("classifier", "masked encoder", "FCMAE")
EVERY_MODEL = pytest.mark.parametrize(
    "model_name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.thorough) for name in MODELS]
)


def made(model_name: str):
    make, arguments = MODELS[model_name]
    return randomized(make()).eval(), arguments


@THOROUGH_EXPORTERS
@EVERY_MODEL
def test_onnxruntime_agrees(model_name, dynamo):
    model, arguments = made(model_name)
    session = onnx_session(model, arguments(2), dynamo)
    assert_runs_as(model, session, [arguments(2), arguments(3), arguments(1)])


class OneBlock(nn.Module):
    """The shortest way through every sparse op of an encoder."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = ck.nn.PatchEmbed(3, 8), ck.nn.ConvNeXtV2Block(8)

    def forward(self, x, hidden):
        layout = ck.PatchLayout.from_mask(hidden)
        return self.block(self.stem(x, layout), layout)


@EXPORTERS
def test_a_batch_of_one_and_its_mask_are_not_baked_in(dynamo):
    model = randomized(OneBlock()).eval()
    assert_runs_as(model, onnx_session(model, masked(1), dynamo), [masked(1), masked(3)])


@THOROUGH_EXPORTERS
def test_a_layout_may_be_a_constant(dynamo):
    class Fixed(nn.Module):
        def __init__(self, encoder: nn.Module, layout: ck.PatchLayout):
            super().__init__()
            self.encoder, self.layout = encoder, layout

        def forward(self, x):
            return self.encoder(x, self.layout)

    model = Fixed(made("encoder")[0], ck.PatchLayout.from_mask(mask(2))).eval()
    assert_runs_as(model, onnx_session(model, (images(2),), dynamo, dynamic=False), [(images(2),)])


@torch.no_grad()
@EVERY_MODEL
def test_traces_of_torchscript(model_name):
    model, arguments = made(model_name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"convnextv2_kernels\.")
        traced = torch.jit.trace(model, arguments(2), strict=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "convnextv2_kernels::" not in str(loaded.inlined_graph)
    for n in (2, 3, 1):
        given = arguments(n)
        for got, expected in zip(flat(loaded(*given)), flat(model(*given)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@EVERY_MODEL
def test_programs_of_torch_export_take_any_batch_and_mask(model_name):
    """With this library's operators: the same kernels, hence the same bits."""
    model, arguments = made(model_name)
    given = arguments(2)
    program = torch.export.export(model, given, dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in given))
    operators = {str(node.target) for node in program.graph.nodes if "convnextv2_kernels" in str(node.target)}
    assert operators or "dense" in model_name or "variant" in model_name
    for n in (2, 3, 1):
        given = arguments(n)
        for got, expected in zip(flat(program.module()(*given)), flat(model(*given)), strict=True):
            torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_programs_of_the_reference_need_no_package():
    with ck.use_backend("reference"):
        program = torch.export.export(OneBlock().eval(), masked(2))
    assert not any("convnextv2_kernels" in str(node.target) for node in program.graph.nodes)


@pytest.mark.thorough
@torch.no_grad()
def test_programs_of_the_reference_become_onnx():
    model, file = randomized(OneBlock()).eval(), io.BytesIO()
    with ck.use_backend("reference"):
        program = torch.export.export(model, masked(2))
    torch.onnx.export(program, (), file, verbose=False)
    assert_runs_as(model, onnxruntime.InferenceSession(file.getvalue()), [masked(2)])


def test_a_forced_backend_without_an_export_says_so():
    model, arguments = made("classifier")
    message = "export of patch_embed_layer_norm to ONNX or TorchScript was asked of backend 'triton', but only the ref"
    with ck.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        torch.jit.trace(model, arguments(2))


@EXPORTERS
def test_sides_may_vary_without_a_mask(dynamo):
    class Dense(OneBlock):
        def forward(self, x):
            return self.block(self.stem(x))

    model, names = randomized(Dense()).eval(), {0: "batch", 2: "height", 3: "width"}
    options = {"dynamic_shapes": (names,)} if dynamo else {"dynamic_axes": {"input0": names}}
    session = onnx_session(model, (images(2),), dynamo, dynamic=False, **options)
    assert_runs_as(model, session, [(torch.randn(n, 3, 75, 50),) for n in (1, 3)])


def test_fcmae_asks_for_a_mask():
    model, _ = made("FCMAE")
    with pytest.raises(ValueError, match="mask must be given in an export to ONNX or TorchScript, which draws none"):
        torch.jit.trace(model, (images(2),))


def test_the_encoder_takes_a_mask():
    encoder, arguments = made("masked encoder")
    x, hidden = arguments(2)
    assert torch.equal(encoder(x, hidden), encoder(x, ck.PatchLayout.from_mask(hidden)))
    with pytest.raises(
        ValueError, match="mask must be a bool tensor of shape .N, Gh, Gw. .True = hidden., got torch.f"
    ):
        encoder(x, hidden.float())


def test_nothing_is_remembered_of_a_trace():
    """Sizes are tensors in a trace: checks that passed there must not be kept, nor what they hold."""
    from convnextv2_kernels.ops import _checks

    model, arguments = made("classifier")
    before = set(_checks._passed)
    torch.jit.trace(model, arguments(2))
    assert _checks._passed == before
