"""The modules against plain PyTorch, dense and packed; names, drop path, errors."""

import pytest
import torch
import torch.nn.functional as F

import convnextv2_kernels as ck
from convnextv2_kernels import nn as cnn

DIM = 6


@pytest.fixture
def layout():
    mask = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 1, 1], [1, 0, 0]]], dtype=torch.bool)
    return ck.PatchLayout.from_mask(mask)


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, DIM, dtype=torch.float64)


def randomised(module):
    torch.manual_seed(1)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def keep_of(layout, x):
    """``[N, H, W, 1]`` of 0 and 1."""
    scale = x.shape[1] // layout.grid[0]
    keep = (~layout.hidden_mask()).to(x.dtype).unsqueeze(-1)
    return keep.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def grn(h, module, keep):
    norm = torch.linalg.vector_norm(h * keep, dim=(1, 2), keepdim=True)
    return h + module.gamma * (h * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + module.beta


def check(module, dense, layout, expected):
    """The module gives ``expected(x, keep)``, on a whole map and on its visible patches."""
    close = {"rtol": 1e-10, "atol": 1e-10}
    everything = torch.ones_like(dense[..., :1])
    torch.testing.assert_close(module(dense), expected(dense, everything), **close)
    keep = keep_of(layout, dense)
    want = ck.ops.gather_patches(expected(dense * keep, keep).contiguous(), layout)
    torch.testing.assert_close(module(ck.ops.gather_patches(dense, layout), layout), want, **close)


@pytest.mark.parametrize(("kernel", "bias"), ((7, True), (3, False), (11, True)))
def test_convolution(dense, layout, kernel, bias):
    module = randomised(cnn.SubmanifoldDepthwiseConv2d(DIM, kernel, bias))

    def expected(x, keep):
        y = F.conv2d(nchw(x), module.weight, module.bias, padding=kernel // 2, groups=DIM)
        return nhwc(y)

    check(module, dense, layout, expected)
    assert set(module.state_dict()) == ({"weight", "bias"} if bias else {"weight"})


def test_layer_norm(dense, layout):
    module = randomised(cnn.LayerNorm(DIM, eps=1e-3))
    params = (module.weight, module.bias)
    check(module, dense, layout, lambda x, keep: F.layer_norm(x, (DIM,), *params, 1e-3))


def test_global_response_norm(dense, layout):
    module = randomised(cnn.GlobalResponseNorm(DIM))
    check(module, dense, layout, lambda x, keep: grn(x, module, keep))
    assert module.gamma.shape == module.beta.shape == (1, 1, 1, DIM)


def test_global_response_norm_starts_as_the_identity(dense):
    module = cnn.GlobalResponseNorm(DIM).double()
    assert torch.equal(module(dense), dense)


def test_scope_of_the_batch(dense):
    """All images of a batch then count as one."""
    module = randomised(cnn.GlobalResponseNorm(DIM, scope="batch"))
    together = grn(dense.reshape(1, 8, 6, DIM), module, 1).reshape(dense.shape)
    torch.testing.assert_close(module(dense), together)


def test_pointwise_mlp(dense, layout):
    module = randomised(cnn.PointwiseMLP(DIM, 10))

    def expected(x, keep):
        return module.pwconv2(grn(F.gelu(module.pwconv1(x)), module.grn, keep))

    check(module, dense, layout, expected)
    residual, scale = torch.randn_like(dense), torch.tensor([0.0, 2.0]).double()
    got = module(dense, residual=residual, drop_path_scale=scale)
    want = residual + expected(dense, 1) * scale.view(2, 1, 1, 1)
    torch.testing.assert_close(got, want)
    assert cnn.PointwiseMLP(DIM).pwconv1.weight.shape == (4 * DIM, DIM)


def block_branch(module, x, keep):
    conv = module.dwconv
    y = nhwc(F.conv2d(nchw(x), conv.weight, conv.bias, padding=3, groups=DIM)) * keep
    y = F.layer_norm(y, (DIM,), module.norm.weight, module.norm.bias, 1e-6)
    return module.pwconv2(grn(F.gelu(module.pwconv1(y)), module.grn, keep))


def test_block(dense, layout):
    module = randomised(cnn.ConvNeXtV2Block(DIM))
    check(module, dense, layout, lambda x, keep: x + block_branch(module, x, keep))
    assert [name for name, _ in module.named_children()] == ["dwconv", "norm", "pwconv1", "grn", "pwconv2"]


@pytest.mark.parametrize("packed", (False, True))
def test_drop_path_skips_whole_images(packed):
    """Each image keeps its branch, divided by the rate of keeping, or loses it."""
    images, rate = 400, 0.25
    module = randomised(cnn.ConvNeXtV2Block(DIM, drop_path=rate))
    layout = None
    x = torch.randn(images, 2, 2, DIM, dtype=torch.float64)
    if packed:
        mask = torch.rand(images, 1, 3) < 0.5
        mask[:, 0, 0] = False
        layout = ck.PatchLayout.from_mask(mask)
        x = torch.randn(layout.num_patches, 2, 2, DIM, dtype=torch.float64)
    branch = module.eval()(x, layout) - x
    assert branch.flatten(1).abs().amax(1).min() > 0
    module.train()
    torch.manual_seed(2)
    got = module(x, layout) - x
    kept = got.flatten(1).abs().amax(1) > 0
    want = branch / (1 - rate) * kept.view(-1, 1, 1, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    image = torch.arange(images) if layout is None else layout.image_of_slot.long()
    votes = torch.zeros(images).index_add(0, image, kept.float())
    sizes = torch.zeros(images).index_add(0, image, torch.ones(len(image)))
    assert ((votes == 0) | (votes == sizes)).all()
    deviation = (rate * (1 - rate) / images) ** 0.5
    assert abs((votes > 0).float().mean().item() - (1 - rate)) < 4 * deviation
    torch.manual_seed(2)
    assert torch.equal(module(x, layout) - x, got)


def test_no_drop_path_draws_nothing(dense):
    module = cnn.ConvNeXtV2Block(DIM).double()
    state = torch.get_rng_state()
    assert module.training
    module(dense)
    assert torch.equal(torch.get_rng_state(), state)


def test_downsample(dense, layout):
    module = randomised(cnn.Downsample(DIM, 9))
    norm, conv = module[0], module[1]

    def expected(x, keep):
        y = F.layer_norm(x, (DIM,), norm.weight, norm.bias, 1e-6)
        return nhwc(F.conv2d(nchw(y), conv.weight, conv.bias, stride=2))

    check(module, dense, layout, expected)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"0.weight": (DIM,), "0.bias": (DIM,), "1.weight": (9, DIM, 2, 2), "1.bias": (9,)}


def test_patch_embed(layout):
    torch.manual_seed(0)
    images = torch.randn(2, 5, 16, 24, dtype=torch.float64)
    module = randomised(cnn.PatchEmbed(5, DIM))
    conv, norm = module[0], module[1]
    y = nhwc(F.conv2d(images, conv.weight, conv.bias, stride=4))
    want = F.layer_norm(y, (DIM,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(module(images), want)
    packed = module(images, layout)
    torch.testing.assert_close(packed, ck.ops.gather_patches(want, layout))
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "0.weight": (DIM, 5, 4, 4),
        "0.bias": (DIM,),
        "1.weight": (DIM,),
        "1.bias": (DIM,),
    }


@pytest.mark.parametrize("packed", (False, True))
def test_gradients_reach_every_parameter(dense, layout, packed):
    x = ck.ops.gather_patches(dense, layout) if packed else dense
    for module in (cnn.ConvNeXtV2Block(DIM), cnn.Downsample(DIM, 9), cnn.PointwiseMLP(DIM)):
        randomised(module)
        out = module(x, layout if packed else None)
        (out * torch.randn_like(out)).sum().backward()
        assert all(p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cnn.SubmanifoldDepthwiseConv2d(0), "dim must be a positive integer, got 0"),
        (lambda: cnn.SubmanifoldDepthwiseConv2d(4, 6), "kernel_size must be odd.*got 6"),
        (lambda: cnn.SubmanifoldDepthwiseConv2d(4, 13), "kernel_size .*got 13"),
        (lambda: cnn.LayerNorm(-1), "dim .*got -1"),
        (lambda: cnn.GlobalResponseNorm(4, scope="all"), "scope must be 'image' or 'batch'"),
        (lambda: cnn.PointwiseMLP(4, 2.5), "hidden .*got 2.5"),
        (lambda: cnn.ConvNeXtV2Block(4, drop_path=1.0), r"drop_path must lie in \[0, 1\), got 1.0"),
        (lambda: cnn.ConvNeXtV2Block(4, scope="none"), "scope .*got 'none'"),
        (lambda: cnn.Downsample(4, True), "dim_out .*got True"),
        (lambda: cnn.PatchEmbed(0, 4), "in_chans .*got 0"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_input_is_refused(dense, layout):
    block = cnn.ConvNeXtV2Block(DIM).double()
    with pytest.raises(ValueError):
        block(dense[..., :-1])
    with pytest.raises(ValueError, match="patches"):
        block(dense, ck.PatchLayout.from_mask(torch.zeros(2, 2, 2, dtype=torch.bool)))
    with pytest.raises(TypeError, match="dtype"):
        block(dense.float())
    with pytest.raises(ValueError, match="sides of at least 2"):
        cnn.Downsample(DIM, 8).double()(dense[:, :1])
