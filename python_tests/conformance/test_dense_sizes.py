"""Dense maps of any size: pixels that a strided convolution leaves over at the border do not affect the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import convnextv2_kernels as ck

from .backends import parametrize_backends
from .samples import Numbers

SIZES = [(8, 12), (9, 12), (8, 15), (11, 7), (5, 4)]


def gradients(out, tensors):
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3)).to(out.device)
    return [out, *torch.autograd.grad(out, tensors, cotangent)]


def compare(backend, op, plain, tensors):
    tensors = [t.to(backend.device).requires_grad_() for t in tensors]
    with ck.use_backend(backend.name):
        got = gradients(op(*tensors), tensors)
    for a, b in zip(got, gradients(plain(*tensors), tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
@parametrize_backends(reference=True)
def test_downsample(backend, size):
    d, c, o = Numbers(0), 3, 5
    tensors = [d.normal(2, *size, c), *d.norm(c).values(), d.normal(o, c, 2, 2), d.normal(o)]

    def plain(x, gain, shift, weight, bias):
        y = F.layer_norm(x, (c,), gain, shift, 1e-6).permute(0, 3, 1, 2)
        return F.conv2d(y, weight, bias, stride=2).permute(0, 2, 3, 1)

    compare(backend, ck.ops.downsample, plain, tensors)


@pytest.mark.parametrize("size", SIZES)
@parametrize_backends(reference=True)
def test_patch_embed(backend, size):
    d, c, o = Numbers(0), 3, 5
    images, weight, bias = d.normal(2, c, *size), d.normal(o, c, 4, 4), d.normal(o)
    gain, shift = d.norm(o).values()

    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=4).permute(0, 2, 3, 1)

    compare(backend, ck.ops.patch_embed, plain, [images, weight, bias])
    compare(
        backend,
        ck.ops.patch_embed_layer_norm,
        lambda x, w, b, gain, shift: F.layer_norm(plain(x, w, b), (o,), gain, shift, 1e-6),
        [images, weight, bias, gain, shift],
    )
