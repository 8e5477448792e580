"""Hidden pixels affect nothing: with NaN in all of them, outputs and gradients keep every bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout
from convnextv2_kernels.models import SparseEncoder

from .backends import BF16, F32, parametrize_backends, parametrize_backends_and_dtypes
from .layouts import make_layout, make_mask
from .samples import cotangent_of, make_sample

PLACES = [("ragged", 2), ("uniform", 4), ("empty_image", 2), ("non_square", 2), ("none_visible", 2)]
PIXEL_OPS = {
    "gather_patches": ("gather_patches", {}, "x"),
    "gathered_pointwise_mlp": ("gathered_pointwise_mlp", {"ln": False}, "x"),
    "gathered_pointwise_mlp with LayerNorm": ("gathered_pointwise_mlp", {}, "x"),
    "patch_embed": ("patch_embed", {}, "images"),
    "patch_embed_layer_norm": ("patch_embed_layer_norm", {}, "images"),
}


def hidden_pixels(layout: PatchLayout, height: int, width: int) -> Tensor:
    """``[N, H, W]`` bool, True where hidden."""
    gh, gw = layout.grid
    mask = layout.hidden_mask()
    return mask.repeat_interleave(height // gh, 1).repeat_interleave(width // gw, 2)


@pytest.mark.parametrize("at", PLACES, ids=lambda at: at[0])
@pytest.mark.parametrize("call", PIXEL_OPS)
@parametrize_backends_and_dtypes((F32, BF16), reference=True)
def test_hidden_pixels_are_not_read(backend, dtype, call, at):
    op, axes, name = PIXEL_OPS[call]
    sample = make_sample(op, at=at, **axes).cast(dtype, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], dtype).to(backend.device, dtype)
    clean = sample.run(backend.name, cotangent)

    pixels = sample.tensors[name].detach().clone()
    channels_last = pixels if name == "x" else pixels.permute(0, 2, 3, 1)
    hidden = hidden_pixels(sample.constants["layout"], *channels_last.shape[1:3])
    channels_last[hidden] = float("nan")
    dirty = sample._replace(tensors=sample.tensors | {name: pixels.requires_grad_()}).run(backend.name, cotangent)
    for key, t in clean.items():
        assert torch.equal(dirty[key], t), f"{key} changed"
    gradient = dirty[name] if name == "x" else dirty[name].permute(0, 2, 3, 1)
    assert not gradient[hidden].any(), "hidden pixels got a gradient"


@pytest.mark.parametrize("at", PLACES, ids=lambda at: at[0])
@parametrize_backends(reference=True)
def test_convolution_after_gather(backend, at):
    """The halo of a patch holds visible neighbours and zeros, never the values under the mask."""
    where, _s = at
    layout = make_layout(where, backend.device)
    sample = make_sample("gather_patches", at=at, c=5).cast(F32, backend.device)
    conv = make_sample("submanifold_depthwise_conv2d", at=at, c=5, k=7).cast(F32, backend.device)
    weight, bias = conv.tensors["weight"], conv.tensors["bias"]
    dense = sample.tensors["x"].detach()

    def run(x):
        x = x.clone().requires_grad_()
        with ck.use_backend(backend.name):
            y = ck.ops.submanifold_depthwise_conv2d(ck.ops.gather_patches(x, layout), weight, bias, layout)
        return y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    clean = run(dense)
    hidden = hidden_pixels(layout, *dense.shape[1:3])
    noisy = dense.clone()
    noisy[hidden] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(clean, run(noisy), strict=True))


@pytest.mark.thorough("triton")
@parametrize_backends(reference=True)
def test_no_layer_of_the_encoder_sees_hidden_pixels(backend):
    torch.manual_seed(0)
    encoder = SparseEncoder(3, depths=(1, 1, 1, 1), dims=(4, 6, 8, 10)).to(backend.device)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mask = make_mask("empty_image")
    layout = PatchLayout.from_mask(mask.to(backend.device))
    images = torch.randn(3, 3, 64, 96).to(backend.device)
    noisy = images.clone()
    noisy.permute(0, 2, 3, 1)[hidden_pixels(layout, 64, 96)] = float("nan")

    def run(pixels):
        seen = []
        hooks = [m.register_forward_hook(lambda _m, _i, o: seen.append(o)) for m in encoder.modules()]
        with ck.use_backend(backend.name):
            out = encoder(pixels, layout)
        for hook in hooks:
            hook.remove()
        return seen, torch.autograd.grad(out.square().sum(), list(encoder.parameters()))

    (layers, gradients), (noisy_layers, noisy_gradients) = run(images), run(noisy)
    assert len(layers) > 8
    assert all(torch.equal(a, b) for a, b in zip(layers, noisy_layers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, noisy_gradients, strict=True))


@pytest.mark.parametrize("op", ["convnextv2_block", "pointwise_mlp", "layer_norm_grn", "submanifold_depthwise_conv2d"])
@parametrize_backends(reference=True)
def test_images_do_not_see_each_other(backend, op):
    """With GRN per image, changing one image (not the dropped one) leaves the features and gradients of the others."""
    sample = make_sample(op, at=("uniform", 2)).cast(F32, backend.device)
    layout = sample.constants["layout"]
    out = sample.run(backend.name)["out"]
    cotangent = cotangent_of(out, F32).to(out)
    clean = sample.run(backend.name, cotangent)
    second = layout.image_of_slot == 1
    changed = sample.tensors["x"].detach().clone()
    changed[second] += 1.0
    dirty = sample._replace(tensors=sample.tensors | {"x": changed.requires_grad_()}).run(backend.name, cotangent)
    for name in ("out", "x"):
        assert torch.equal(dirty[name][~second], clean[name][~second])
    assert not torch.equal(dirty["out"][second], clean["out"][second])


@pytest.mark.parametrize("bad", ("x", "cotangent"))
@parametrize_backends(reference=True)
def test_a_bad_image_of_uneven_ones_stays_alone(backend, bad):
    """NaN in one row of an image, or of its cotangent: the others keep every bit of their output and gradient."""
    sample = make_sample("layer_norm_grn", at=("empty_image", 2)).cast(F32, backend.device)
    image = sample.constants["layout"].image_of_slot
    where = int(image.max())
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device)
    clean = sample.run(backend.name, cotangent)
    x = sample.tensors["x"].detach().clone()
    (x if bad == "x" else cotangent)[image == where, 0, 0, 0] = float("nan")
    dirty = sample._replace(tensors=sample.tensors | {"x": x.requires_grad_()}).run(backend.name, cotangent)
    for name in ("out", "x"):
        assert torch.equal(dirty[name][image != where], clean[name][image != where])
    assert dirty["x"][image == where].isnan().all()


@parametrize_backends(reference=True)
def test_a_bad_cotangent_of_a_visible_site_stays_off_the_fill(backend):
    """The gradient of ``fill`` sums hidden sites only, whatever the values at visible ones."""
    sample = make_sample("scatter_patches", at=("ragged", 2)).cast(F32, backend.device)
    layout = sample.constants["layout"]
    out = sample.run(backend.name)["out"]
    cotangent = cotangent_of(out, F32).to(out)
    clean = sample.run(backend.name, cotangent)
    cotangent[~hidden_pixels(layout, *out.shape[1:3])] = float("inf")
    assert torch.equal(sample.run(backend.name, cotangent)["fill"], clean["fill"])
