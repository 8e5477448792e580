"""GRN's ablations against explicit loops, the fused ops and finite differences; "none"; errors."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import brute_force, tolerance

import convnextv2_kernels as ck
from convnextv2_kernels import nn as cnn
from convnextv2_kernels.backends.reference import grn_variants
from convnextv2_kernels.dtypes import gemm_dtype
from convnextv2_kernels.nn import GRNVariant
from convnextv2_kernels.ops._dispatch import no_autocast

from .grn_by_hand import FORMULAS, grn, ragged_mask, variant_text

DIM = 5
# Sums of a few hundred float64 numbers, and the 1 / (mean G + eps) of signed means, which can be some hundreds.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
ABLATIONS = [formula for formula in FORMULAS if formula != ("l2", "divisive", True)]


def randomised(module, dtype=torch.float64):
    torch.manual_seed(1)
    module.to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


def inputs(mask, side=2, dim=DIM, dtype=torch.float64):
    torch.manual_seed(2)
    if mask is None:
        return torch.randn(3, 3, 4, dim, dtype=dtype), None
    layout = ck.PatchLayout.from_mask(mask)
    return torch.randn(layout.num_patches, side, side, dim, dtype=dtype), layout


def by_variant_code(block):
    """The forward of a block by the code of the ablations, whatever its variant."""

    def forward(x, layout):
        dtype = gemm_dtype(x)
        with no_autocast(x):
            settings = (None, block.grn.scope, "gelu", block.norm.eps, block.grn.eps, dtype, *block.grn.variant.formula)
            return grn_variants.convnextv2_block(x, *block._parameters_in_order(block.grn), layout, *settings)

    return forward


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("formula", FORMULAS, ids=variant_text)
def test_layer_is_the_formula(formula, packed, scope):
    module = randomised(cnn.GlobalResponseNorm(DIM, scope=scope, variant=variant_text(formula)))
    mask = ragged_mask() if packed else None
    x, layout = inputs(mask)
    want = grn(x.numpy(), *(p.detach().numpy().ravel() for p in (module.gamma, module.beta)), mask, scope, formula)
    torch.testing.assert_close(module(x, layout), torch.from_numpy(want), **CLOSE)


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("formula", FORMULAS, ids=variant_text)
def test_block_is_the_formula(formula, scope):
    block = randomised(cnn.ConvNeXtV2Block(DIM, scope=scope, grn=variant_text(formula)))
    mask = ragged_mask()
    x, layout = inputs(mask)
    p = {name: value.detach().numpy() for name, value in block.named_parameters()}
    y = brute_force.submanifold_depthwise_conv2d(x.numpy(), p["dwconv.weight"], p["dwconv.bias"], mask.numpy())
    y = brute_force.layer_norm(y, p["norm.weight"], p["norm.bias"])
    h = brute_force.gelu(y @ p["pwconv1.weight"].T + p["pwconv1.bias"])
    h = grn(h, p["grn.gamma"].ravel(), p["grn.beta"].ravel(), mask, scope, formula)
    want = torch.from_numpy(x.numpy() + h @ p["pwconv2.weight"].T + p["pwconv2.bias"])
    # 4 * DIM hidden channels between two products: rounding is that of the largest value, not of each
    torch.testing.assert_close(block(x, layout), want, rtol=1e-10, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("formula", FORMULAS, ids=variant_text)
def test_gradients_are_those_of_finite_differences(formula, packed):
    """Of the layer, by input and parameters; no value is near 0, where |x| has a corner."""
    module = randomised(cnn.GlobalResponseNorm(3, variant=variant_text(formula)))
    x, layout = inputs(ragged_mask() if packed else None, side=1, dim=3)
    x = (x + 0.2 * x.sign()).requires_grad_()
    names = ("gamma", "beta")

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, layout))

    assert torch.autograd.gradcheck(call, (x, module.gamma, module.beta))


@pytest.mark.parametrize("formula", (("l1", "standardize", False), ("mean", "inverse", True)), ids=variant_text)
def test_block_gradients_are_those_of_finite_differences(formula):
    block = randomised(cnn.ConvNeXtV2Block(2, grn=variant_text(formula)))
    x, layout = inputs(ragged_mask(), side=1, dim=2)
    names = [name for name, _ in block.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, layout))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *block.parameters()), fast_mode=True)


def run(function, module, x, layout, cotangent):
    """Output and every gradient, by name."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = function(x, layout)
    out.backward(cotangent)
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("packed", (True, False))
def test_default_through_the_variant_code_is_the_fused_op(packed, scope):
    """Within the rule for kernels: twice the error of plain PyTorch (here the variant's code), plus rounding."""
    block = randomised(cnn.ConvNeXtV2Block(8, scope=scope), torch.float32)
    x, layout = inputs(ragged_mask() if packed else None, dim=8, dtype=torch.float32)
    cotangent = torch.randn_like(x)
    plain = run(by_variant_code(block), block, x, layout, cotangent)
    with ck.use_backend("reference"):
        for name, value in run(block, block, x, layout, cotangent).items():
            assert torch.equal(value, plain[name]), name  # the same operations in the same order
    fused = run(block, block, x, layout, cotangent)
    exact = copy.deepcopy(block).double()
    truth = run(by_variant_code(exact), exact, x.double(), layout, cotangent.double())
    rows = x.numel() // x.shape[-1]
    ordinary = tolerance.errors(plain, truth)
    tolerance.assert_conforms("convnextv2_block", fused, truth, ordinary, torch.float32, rows)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_is_that_of_the_reference(dtype):
    """GEMMs and hidden activations in 16 bits, everything else unchanged; gradients in the parameters' dtype."""
    block = randomised(cnn.ConvNeXtV2Block(8), torch.float32)
    x, layout = inputs(ragged_mask(), dim=8, dtype=torch.float32)
    cotangent = torch.randn_like(x)
    with torch.autocast("cpu", dtype=dtype):
        with ck.use_backend("reference"):
            want = run(block, block, x, layout, cotangent)
        got = run(by_variant_code(block), block, x, layout, cotangent)
        ablated = randomised(cnn.ConvNeXtV2Block(8, grn="l1,no-skip"), torch.float32)
        narrow = run(ablated, ablated, x, layout, cotangent)
    for name, value in want.items():
        assert torch.equal(got[name], value) and value.dtype == torch.float32, name
    wide = run(ablated, ablated, x, layout, cotangent)
    for name, value in wide.items():
        assert narrow[name].dtype == torch.float32, name
        # two products and GRN with operands of that many bits: errors of some roundings of the largest value
        assert (narrow[name] - value).abs().max() < 16 * torch.finfo(dtype).eps * value.abs().max(), name


@pytest.mark.parametrize("formula", FORMULAS, ids=variant_text)
@pytest.mark.parametrize("kind", ("no image", "no visible patch", "zero channel", "all zero", "equal channels"))
def test_degenerate_maps_have_finite_values_and_gradients(formula, kind):
    module = randomised(cnn.GlobalResponseNorm(DIM, variant=variant_text(formula)))
    mask = {"no image": torch.ones(0, 2, 3), "no visible patch": torch.ones(3, 2, 3)}.get(kind, ragged_mask()).bool()
    x, layout = inputs(mask)
    if kind == "zero channel":
        x[..., 1] = 0
    elif kind == "all zero":
        x = torch.zeros_like(x)
    elif kind == "equal channels":
        x = x[..., :1].expand_as(x).contiguous()
    got = run(module, module, x, layout, torch.randn_like(x))
    assert all(value.isfinite().all() for value in got.values())
    if kind == "zero channel":
        assert torch.equal(got["out"][..., 1], module.beta.flatten()[1].expand(x.shape[:-1]))


def test_none_is_the_block_without_grn():
    block = cnn.ConvNeXtV2Block(8, grn="none")
    x, layout = inputs(ragged_mask(), dim=8, dtype=torch.float32)
    y = ck.ops.depthwise_conv_layer_norm(
        x, block.dwconv.weight, block.dwconv.bias, block.norm.weight, block.norm.bias, layout
    )
    assert not block.grn.gamma.requires_grad and not block.grn.gamma.any() and not block.grn.beta.any()
    with ck.use_backend("reference"):
        y = ck.ops.submanifold_depthwise_conv2d(x, block.dwconv.weight, block.dwconv.bias, layout)
        y = ck.ops.layer_norm(y, block.norm.weight, block.norm.bias)
        want = x + block.pwconv2(F.gelu(block.pwconv1(y)))
        assert torch.equal(block(x, layout), want)
    assert torch.equal(by_variant_code(block)(x, layout), want)
    # the fused op adds in another order: a few roundings of numbers of this size
    torch.testing.assert_close(block(x, layout), want, rtol=0, atol=8 * 2**-23 * want.abs().max().item())
    layer = cnn.GlobalResponseNorm(8, variant="none")
    assert torch.equal(layer(x, layout), x)


def test_none_has_its_parameters_in_the_state_dict_and_never_trains_them():
    default, block = cnn.ConvNeXtV2Block(8), cnn.ConvNeXtV2Block(8, grn="none")
    assert list(block.state_dict()) == list(default.state_dict())
    block.load_state_dict(default.state_dict())
    x, layout = inputs(ragged_mask(), dim=8, dtype=torch.float32)
    assert torch.equal(block(x, layout), default(x, layout))
    for thawed in (False, True):  # a whole model may be frozen and thawed again
        if thawed:
            block.requires_grad_(True)
        got = run(block, block, x, layout, torch.randn_like(x))
        assert set(got) - {"out", "x"} == {n for n, _ in block.named_parameters() if not n.startswith("grn")}
    trained = {**default.state_dict(), "grn.beta": torch.full((1, 1, 1, 32), 0.5)}
    before = block(x, layout)
    with pytest.raises(RuntimeError, match="grn.beta must be zero for the GRN variant 'none'"):
        block.load_state_dict(trained)
    assert torch.equal(block(x, layout), before)
    with torch.no_grad():
        block.grn.gamma.fill_(1)
    assert torch.equal(block(x, layout), before)


def test_initial_gamma():
    """At zero a block without skip would start as the identity with dead layers before GRN."""
    for text, gamma in (("default", 0), ("none", 0), ("l1,standardize", 0), ("no-skip", 1), ("mean,no-skip", 1)):
        grn_layer = cnn.ConvNeXtV2Block(4, grn=text).grn
        assert (grn_layer.gamma == gamma).all() and not grn_layer.beta.any(), text
        assert grn_layer.gamma.requires_grad == (text != "none")


@pytest.mark.parametrize("text", ("l1,standardize,no-skip", "mean,inverse", "none"))
def test_compiles_in_one_graph_copies_and_pickles(text):
    block = randomised(cnn.ConvNeXtV2Block(4, grn=text), torch.float32)
    x, layout = inputs(ragged_mask(), dim=4, dtype=torch.float32)
    cotangent = torch.randn_like(x)
    want = run(block, block, x, layout, cotangent)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for name, value in run(compiled, block, x, layout, cotangent).items():
        torch.testing.assert_close(value, want[name])
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin.grn.variant == block.grn.variant and torch.equal(twin(x, layout), want["out"])


@pytest.mark.parametrize("formula", ABLATIONS, ids=variant_text)
def test_forced_backend_is_refused(formula):
    text = str(GRNVariant(*formula))
    x, layout = inputs(ragged_mask())
    modules = cnn.ConvNeXtV2Block(DIM, grn=text), cnn.GlobalResponseNorm(DIM, variant=text)
    for module in modules:
        module.double()
        with ck.use_backend("triton"), pytest.raises(RuntimeError, match=f"'{text}'.*'triton', but only the reference"):
            module(x, layout)
        with ck.use_backend("reference"):
            module(x, layout)


def test_brute_force_knows_the_default():
    """The loops here agree with the conformance suite's where both implement the formula."""
    mask, rng = ragged_mask(), np.random.default_rng(0)
    x, gamma, beta = rng.normal(size=(10, 2, 2, 3)), rng.normal(size=3), rng.normal(size=3)
    for scope in ("image", "batch"):
        want = brute_force.global_response_norm(x, gamma, beta, mask.numpy(), scope)
        np.testing.assert_allclose(grn(x, gamma, beta, mask, scope, ("l2", "divisive", True)), want, rtol=1e-12)


@pytest.mark.parametrize("options", [{"grn": "l1"}, {"visible": torch.ones(2, 4, 4, 1)}], ids=("variant", "masked"))
def test_the_form_of_gelu_reaches_plain_blocks(options):
    block = randomised(cnn.ConvNeXtV2Block(6))
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    exact, tanh = (
        ck.ops.convnextv2_block(x, *block._parameters_in_order(block.grn), act=act, **options)
        for act in ("gelu", "gelu_tanh")
    )
    assert 0 < (exact - tanh).abs().max() < 1e-2
