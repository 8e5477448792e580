"""The layers in GRN's place against formulas in numpy, timm's own modules on whole maps, and the masked dense block."""

import sys

import numpy as np
import pytest
import torch
from conformance import brute_force

import convnextv2_kernels as ck
from convnextv2_kernels import nn as cnn

from .grn_by_hand import owners, ragged_mask

LAYERS = ("lrn", "bn", "ln", "se", "cbam")
DIM = 16
# A few hundred float64 products and sums, in another order
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def layer_of(kind, dim=DIM):
    """With weights and statistics that do something."""
    layer = cnn.hidden_layer(dim, grn=kind).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("constants"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.3)
            if name.endswith("running_var"):
                tensor.add_(1)
    return layer


def inputs(mask, dim=DIM):
    torch.manual_seed(2)
    if mask is None:
        return torch.randn(3, 4, 6, dim, dtype=torch.float64), None
    layout = ck.PatchLayout.from_mask(mask)
    return torch.randn(layout.num_patches, 2, 2, dim, dtype=torch.float64), layout


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def batch_norm(rows, p, prefix, training):
    mean, var = (rows.mean(0), rows.var(0)) if training else (p[prefix + "running_mean"], p[prefix + "running_var"])
    return (rows - mean) / np.sqrt(var + 1e-5) * p[prefix + "weight"] + p[prefix + "bias"]


def by_hand(kind, x, mask, p, training):
    """``p``: the layer's tensors by name, without "layer."."""
    rows = x.reshape(-1, x.shape[-1])
    if kind == "lrn":
        near = np.pad(rows**2, ((0, 0), (2, 2)))
        mean = sum(near[:, i : i + rows.shape[1]] for i in range(5)) / 5
        return (rows / (1 + 1e-4 * mean) ** 0.75).reshape(x.shape)
    if kind == "ln":
        return brute_force.layer_norm(x, p["weight"], p["bias"])
    if kind == "bn":
        return batch_norm(rows, p, "", training).reshape(x.shape)
    owner = owners(x, mask, "image")

    def excite(pooled, prefix):
        bias = [p.get(f"{prefix}fc{j}.bias", 0.0) for j in (1, 2)]
        hidden = np.maximum(p[f"{prefix}fc1.weight"][:, :, 0, 0] @ pooled + bias[0], 0)
        return p[f"{prefix}fc2.weight"][:, :, 0, 0] @ hidden + bias[1]

    out = np.zeros_like(x)
    for image in set(owner.tolist()):
        here = x[owner == image]
        sites = here.reshape(-1, x.shape[-1])
        if kind == "se":
            out[owner == image] = here * sigmoid(excite(sites.mean(0), ""))
        else:
            pools = excite(sites.mean(0), "channel."), excite(sites.max(0), "channel.")
            out[owner == image] = here * sigmoid(pools[0] + pools[1])
    if kind == "se":
        return out
    maps = np.stack((out.mean(-1), out.max(-1)), -1)
    kernel = p["spatial.conv.conv.weight"].transpose(1, 0, 2, 3)
    # the sum over both maps of a depthwise convolution: hidden sites are zero
    attention = brute_force.submanifold_depthwise_conv2d(maps, kernel, None, None if mask is None else mask.numpy())
    rows = attention.sum(-1).reshape(-1, 1)
    return out * sigmoid(batch_norm(rows, p, "spatial.conv.bn.", training).reshape(*x.shape[:-1], 1))


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("packed", (True, False))
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_is_the_formula(kind, packed, training):
    layer, mask = layer_of(kind).train(training), ragged_mask() if packed else None
    x, layout = inputs(mask)
    p = {name.removeprefix("layer."): t.numpy().copy() for name, t in layer.state_dict().items()}
    want = by_hand(kind, x.numpy(), mask, p, training)
    torch.testing.assert_close(layer(x, layout).detach(), torch.from_numpy(want), **CLOSE)
    assert np.abs(want - x.numpy()).max() > 1e-4  # LRN's alpha is that small


@pytest.mark.parametrize("kind", ("se", "cbam"))
def test_on_whole_maps_it_is_the_module_of_timm(kind):
    layer = layer_of(kind)
    x, _ = inputs(None)
    want = layer.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), want, **CLOSE)


@pytest.mark.parametrize("kind", LAYERS)
def test_masked_dense_block_is_the_packed_block(kind):
    """Values and gradients; so nothing of a hidden site is in the layer's statistics."""
    block = cnn.ConvNeXtV2Block(DIM // 4, grn=kind).double()
    block.grn.load_state_dict(layer_of(kind).state_dict())
    mask = ragged_mask()
    x, layout = inputs(mask, DIM // 4)
    x.requires_grad_()
    packed = block(x, layout)
    visible = ck.ops.scatter_patches(torch.ones_like(x[..., :1]), layout)
    dense = ck.ops.gather_patches(block(ck.ops.scatter_patches(x, layout), visible=visible), layout)
    torch.testing.assert_close(dense, packed, **CLOSE)
    cotangent = torch.randn_like(packed)
    grads = [
        torch.autograd.grad(out, (x, block.pwconv1.weight), cotangent, retain_graph=True) for out in (packed, dense)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert torch.autograd.gradcheck(lambda x: block(x, layout), x, fast_mode=True)


def test_running_statistics_are_of_visible_rows():
    layer, (x, layout) = cnn.hidden_layer(DIM, grn="bn").double(), inputs(ragged_mask())
    layer(x, layout)
    rows = x.reshape(-1, DIM)
    torch.testing.assert_close(layer.layer.running_mean, 0.1 * rows.mean(0), **CLOSE)
    torch.testing.assert_close(layer.layer.running_var, 0.9 + 0.1 * rows.var(0), **CLOSE)


@pytest.mark.parametrize("kind", LAYERS)
def test_batches_without_a_visible_site_pass(kind):
    x, layout = inputs(torch.ones(2, 2, 3).bool())
    assert cnn.ConvNeXtV2Block(DIM, grn=kind).double()(x, layout).shape == x.shape


@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_under_autocast(kind):
    block, (x, layout) = cnn.ConvNeXtV2Block(DIM, grn=kind), inputs(ragged_mask())
    x = x.float()
    wide = block(x, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = block(x, layout)
    assert narrow.dtype == torch.float32
    # two products with operands of 8 bits
    assert 0 < (narrow - wide).abs().max() < 16 * 2**-8 * wide.abs().max()


@pytest.mark.parametrize(("kind", "millions"), (("default", 88.7), ("se", 109.6), ("cbam", 109.5)))
def test_parameters_at_base(kind, millions):
    """Table 2e: 89 M, and 109 M with SE or CBAM."""
    with torch.device("meta"):
        model = ck.models.create_model("convnextv2_base", grn=kind)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ("se", "cbam"))
def test_exports(kind):
    """On whole maps as on any; for any mask, where PyTorch can."""
    config = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "grn": kind}
    model, x = ck.models.ConvNeXtV2(num_classes=3, **config).eval(), torch.randn(2, 3, 64, 64)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    encoder, mask = ck.models.SparseEncoder(3, **config).eval(), ragged_mask()[2:, :, :2]
    if kind == "se":
        program = torch.export.export(encoder, (x, mask)).module()
        torch.testing.assert_close(program(x, ~mask), encoder(x, ~mask))
    else:
        with pytest.raises(
            Exception, match=f"grn '{kind}' needs the number of visible rows, which an exported program"
        ):
            torch.export.export(encoder, (x, mask))


def test_refusals(monkeypatch):
    x, layout = inputs(ragged_mask())
    block = cnn.ConvNeXtV2Block(DIM, grn="ln").double()
    with ck.use_backend("triton"), pytest.raises(RuntimeError, match="'ln' in the place of GRN .*only the reference"):
        block(x, layout)
    other = cnn.ConvNeXtV2Block(DIM).double()
    params = other._parameters_in_order(other.grn)
    with pytest.raises(ValueError, match="grn must be a formula of GRN here, got 'se'"):
        ck.ops.convnextv2_block(x, *params, layout, grn="se")
    with pytest.raises(ValueError, match="variant must be a formula of GRN, got 'bn'"):
        ck.ops.global_response_norm(x, torch.zeros(DIM).double(), torch.zeros(DIM).double(), layout, variant="bn")
    with pytest.raises(ValueError, match="layer='se' replaces GRN, so the other fields must keep their defaults"):
        cnn.GRNVariant("l1", layer="se")
    report = ck.fuse(torch.nn.Sequential(block), strict=False)
    assert "its GRN variant 'ln' runs in plain PyTorch" in str(report.skipped)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(ImportError, match="grn needs timm for 'se', and timm cannot be imported .*pip install timm"):
        cnn.ConvNeXtV2Block(DIM, grn="se")
