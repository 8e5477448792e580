"""The block of ConvNeXt V1: no GRN and a layer scale, which kernels see folded into the second linear layer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conformance.backends import parametrize_backends
from conformance.layouts import make_layout
from helpers.reference_models import timm
from torch import Tensor

import convnextv2_kernels as ck
from convnextv2_kernels import nn

DIM = 6


def v1_block(**changes) -> nn.ConvNeXtV2Block:
    torch.manual_seed(0)
    block = nn.ConvNeXtV2Block(DIM, grn="none", layer_scale=1e-6, **changes).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
    return block


def by_formula(block: nn.ConvNeXtV2Block, x: Tensor, drop_path_scale: Tensor) -> Tensor:
    """``x + drop_path(gamma * (W2 GELU(W1 LN(conv(x)) + b1) + b2))`` of dense ``x [N, H, W, C]``."""
    y = F.conv2d(x.permute(0, 3, 1, 2), block.dwconv.weight, block.dwconv.bias, padding=3, groups=DIM)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (DIM,), block.norm.weight, block.norm.bias, 1e-6)
    return x + drop_path_scale.view(-1, 1, 1, 1) * block.gamma * block.pwconv2(F.gelu(block.pwconv1(y)))


@parametrize_backends(reference=True)
def test_values_and_gradients_are_those_of_the_formula(backend):
    if not backend.has_float64:
        pytest.skip("the comparison is in float64")
    block = v1_block(drop_path=0.5).to(backend.device)
    x = torch.randn(3, 5, 4, DIM, dtype=torch.float64, device=backend.device, requires_grad=True)
    block.given_drop_path = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64, device=backend.device)
    cotangent = torch.randn_like(x)
    wanted = dict(block.named_parameters()) | {"x": x}
    expected = by_formula(block, x, block.given_drop_path)
    with ck.use_backend(backend.name):
        out = block(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    got, want = (torch.autograd.grad(result, list(wanted.values()), cotangent) for result in (out, expected))
    for name, one, other in zip(wanted, got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * other.abs().max().item(), msg=name)
    assert torch.equal(out[0], x[0]) and "gamma" in wanted and not any("grn" in name for name in wanted)


@torch.no_grad()
def test_the_block_of_timm_computes_the_same():
    block, theirs = v1_block(), timm.models.convnext.ConvNeXtBlock(DIM).double().eval()
    names = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    state = {}
    for key, tensor in block.state_dict().items():
        layer, dot, kind = key.partition(".")
        state[f"{names.get(layer, layer)}{dot}{kind}"] = tensor
    theirs.load_state_dict(state)
    x = torch.randn(2, 7, 9, DIM, dtype=torch.float64)
    expected = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_packed_patches_and_the_masked_dense_block_agree():
    block, layout = v1_block(), make_layout("ragged")
    x = torch.randn(layout.num_patches, 4, 4, DIM, dtype=torch.float64)
    with ck.use_backend("reference"):
        expected = block(x, layout)
    torch.testing.assert_close(block(x, layout), expected, rtol=1e-10, atol=1e-10)
    visible = (~layout.hidden_mask()).double().repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None]
    masked = block(ck.ops.scatter_patches(x, layout), visible=visible)
    torch.testing.assert_close(ck.ops.gather_patches(masked, layout), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(masked, masked * visible)


@pytest.mark.parametrize("scale", [1e-6, -3.0])
def test_a_tiny_scale_survives_sixteen_bits(scale):
    """bfloat16 holds the folded weights; float16 would lose them, so there the result is multiplied."""
    block = v1_block().float()
    x = torch.randn(2, 4, 4, DIM)
    with torch.no_grad():
        block.gamma.fill_(scale)
    exact = (by_formula(copy.deepcopy(block).double(), x.double(), torch.ones(2)) - x.double()) / scale
    for dtype in (torch.float16, torch.bfloat16):
        zero = torch.zeros_like(x)  # the residual would drown the branch
        params = block._parameters_in_order(block.grn)
        with torch.autocast("cpu", dtype=dtype):
            y = ck.ops.depthwise_conv_layer_norm(x, *params[:4])
            out = ck.ops.pointwise_mlp(y, *params[4:], residual=zero, layer_scale=block.gamma)
        # two products of operands with that many bits
        error = (out.double() / scale - exact).abs().max()
        assert error < 8 * torch.finfo(dtype).eps * exact.abs().max(), dtype
        (grad,) = torch.autograd.grad(out.sum() / abs(scale), [block.gamma])
        assert torch.isfinite(grad).all() and grad.abs().min() > 0


@pytest.mark.thorough
def test_compiles_in_one_graph_copies_and_pickles():
    block = v1_block()
    x = torch.randn(2, 5, 5, DIM, dtype=torch.float64)
    out = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), out)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), out)


def test_what_layers_and_ops_refuse():
    block, x = v1_block(), torch.randn(1, 4, 4, DIM, dtype=torch.float64)
    params = block._parameters_in_order(block.grn)
    assert params[6] is None and params[7] is None
    for value, shown in ((0, "0"), (float("nan"), "nan"), (True, "True"), ("1e-6", "'1e-6'")):
        with pytest.raises(ValueError, match=f"layer_scale must be a finite number other than 0, .* got {shown}"):
            nn.ConvNeXtV2Block(DIM, layer_scale=value)
    with pytest.raises(ValueError, match=r"layer_scale has shape \[1\], expected \[6\]"):
        ck.ops.convnextv2_block(x, *params, layer_scale=torch.ones(1, dtype=torch.float64))
    half = (*params[:6], torch.ones(4 * DIM, dtype=torch.float64), *params[7:])
    with pytest.raises(ValueError, match=r"beta must be a tensor where gamma is, or both None \(no GRN\), got None"):
        ck.ops.convnextv2_block(x, *half)
    with pytest.raises(ValueError, match="gamma and beta must be tensors for the GRN variant 'l1', got None"):
        ck.ops.convnextv2_block(x, *params, grn="l1")
    with pytest.raises(ValueError, match="affine must be True for the GRN variant 'default', got False"):
        nn.GlobalResponseNorm(DIM, affine=False)
    assert nn.GlobalResponseNorm(DIM, variant="none", affine=False)(x) is x
