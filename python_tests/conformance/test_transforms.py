"""torch.func, forward mode and batched gradients: the kernels have none and say so, the reference has all."""

import pytest
import torch
from fuse.networks import randomized
from helpers.official import Block
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import convnextv2_kernels as ck

C = 4
RUN_UNDER = r"run the forward pass under convnextv2_kernels.use_backend\('reference'\) for that"


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def block_op():
    sizes = ((C, 1, 7, 7), (C,), (C,), (C,), (4 * C, C), (4 * C,), (4 * C,), (4 * C,), (C, 4 * C), (C,))
    parameters = [tensor(*size) for size in sizes]
    return lambda x: ck.ops.convnextv2_block(x, *parameters)


def norm_op():
    weight, bias = tensor(C), tensor(C)
    return lambda x: ck.ops.layer_norm(x, weight, bias)


def sparse_conv():
    layout = ck.PatchLayout.from_mask(torch.tensor([[[True, False]], [[False, True]]]))
    weight = tensor(C, 1, 7, 7)
    return lambda x: ck.ops.submanifold_depthwise_conv2d(x, weight, None, layout)


def own_model():
    model = randomized(ck.models.ConvNeXtV2(C, 3, (1, 1, 1, 1), (4, 4, 4, 4))).double().eval()
    return lambda x: model(x.permute(0, 3, 1, 2).repeat(1, 1, 8, 8))


def fused_block():
    block = randomized(Block(C)).double().eval()
    ck.fuse(block)
    return lambda x: block(x.permute(0, 3, 1, 2))


FUNCTIONS = {"block": block_op, "norm": norm_op, "sparse": sparse_conv, "model": own_model, "fused": fused_block}


def few(function):
    """A scalar function of two numbers, for second derivatives."""
    x = tensor(2, 4, 4, C)
    return lambda t: function(x * t.sum()).square().sum()


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: vjp(lambda x: f(x).sum(), x)[1](torch.ones((), dtype=x.dtype)),
    "jvp": lambda f, x: jvp(f, (x,), (x,))[1],
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "per-sample grad": lambda f, x: vmap(grad(lambda x: f(x).square().sum()))(torch.stack([x, 2 * x])),
    "hessian": lambda f, x: hessian(few(f))(torch.ones(2, dtype=x.dtype)),
    "jacrev": lambda f, x: jacrev(lambda x: f(x).flatten()[:2])(x),
    "jacfwd": lambda f, x: jacfwd(few(f))(torch.ones(2, dtype=x.dtype)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_name_the_reference_which_has_them(function, transform):
    f, x = FUNCTIONS[function](), tensor(2, 4, 4, C)
    with pytest.raises(RuntimeError, match=rf"cannot be transformed by torch.func \(vmap, .*; {RUN_UNDER}"):
        TRANSFORMS[transform](f, x)
    with ck.use_backend("reference"):
        got = TRANSFORMS[transform](f, x)
    assert torch.isfinite(got[0] if isinstance(got, tuple) else got).all()
    if transform == "grad":
        x.requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(f(x).square().sum(), x)[0])


def test_gradients_per_sample_over_parameters():
    model = nn.Sequential(ck.nn.ConvNeXtV2Block(C)).double()
    x = tensor(3, 4, 4, C)

    def gradients():
        def loss(parameters, image):
            return functional_call(model, parameters, (image[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), x)

    with pytest.raises(RuntimeError, match=RUN_UNDER):
        gradients()
    with ck.use_backend("reference"):
        got = gradients()
    for name, p in model.named_parameters():
        for i in range(3):
            torch.testing.assert_close(got[name][i], torch.autograd.grad(model(x[i, None]).square().sum(), p)[0])


def test_forward_mode_names_the_reference():
    f, x = norm_op(), tensor(2, 4, 4, C)
    with forward_ad.dual_level():
        assert torch.equal(f(x), f(x))
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=f"layer_norm has no forward-mode derivative; {RUN_UNDER}"):
            f(dual)
        with ck.use_backend("reference"):
            assert forward_ad.unpack_dual(f(dual)).tangent is not None


def test_batched_gradients_name_the_reference():
    f, x = block_op(), tensor(2, 4, 4, C).requires_grad_()
    cotangents = tensor(3, 2, 4, 4, C)
    with pytest.raises(RuntimeError, match=f"BlockBackward takes no batch of gradients .vmap.; {RUN_UNDER}"):
        torch.autograd.grad(f(x), x, cotangents, is_grads_batched=True)
    with ck.use_backend("reference"):
        (got,) = torch.autograd.grad(f(x), x, cotangents, is_grads_batched=True)
    for each, cotangent in zip(got, cotangents, strict=True):
        torch.testing.assert_close(each, torch.autograd.grad(f(x), x, cotangent)[0])
