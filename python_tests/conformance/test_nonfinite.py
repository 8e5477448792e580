"""NaN and infinity in one pixel of one image, judged by the official formulas in plain PyTorch.

What is not finite there is not finite here, in the output and in every gradient, and other images stay as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import convnextv2_kernels as ck

from .backends import F32, F64, parametrize_backends
from .samples import cotangent_of, make_sample

VALUES = (float("nan"), float("inf"), float("-inf"))
EPS = 1e-6
OPS = {
    "layer_norm": {},
    "submanifold_depthwise_conv2d": {},
    "depthwise_conv_layer_norm": {},
    "global_response_norm": {},
    "gelu_grn": {},
    "layer_norm_grn": {},
    "pointwise_mlp": {"act": "gelu"},
    "convnextv2_block": {"act": "gelu"},
}
CASES = [*OPS.items(), ("pointwise_mlp", {"act": "gelu_tanh"}), ("convnextv2_block", {"act": "gelu_tanh"})]


def grn(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The official module, ``models/utils.py`` of facebookresearch/ConvNeXt-V2."""
    gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    nx = gx / (gx.mean(dim=-1, keepdim=True) + EPS)
    return t["gamma"].reshape(-1) * (x * nx) + t["beta"].reshape(-1) + x


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def mlp(x: Tensor, t: dict[str, Tensor], constants: dict, residual: Tensor) -> Tensor:
    a = F.linear(x, t["w1"], t["b1"])
    h = grn(F.gelu(a, approximate="tanh" if constants["act"] == "gelu_tanh" else "none"), t)
    y = F.linear(h, t["w2"], t["b2"]) * constants["drop_path_scale"].to(x).view(-1, 1, 1, 1)
    return residual + y


def official(op: str, t: dict[str, Tensor], constants: dict) -> Tensor:
    x = t["x"]
    if op == "layer_norm":
        return norm(x, t["weight"], t["bias"])
    if op == "submanifold_depthwise_conv2d":
        return conv(x, t["weight"], t["bias"])
    if op == "depthwise_conv_layer_norm":
        return norm(conv(x, t["weight"], t["bias"]), t["ln_weight"], t["ln_bias"])
    if op == "global_response_norm":
        return grn(x, t)
    if op == "gelu_grn":
        return grn(F.gelu(x), t)
    if op == "layer_norm_grn":
        return grn(norm(x, t["ln_weight"], t["ln_bias"]), t)
    if op == "pointwise_mlp":
        return mlp(x, t, constants, t["residual"])
    y = norm(conv(x, t["dw_weight"], t["dw_bias"]), t["ln_weight"], t["ln_bias"])
    return mlp(y, t, constants, x)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("op", "axes"), CASES, ids=["-".join((op, *axes.values())) for op, axes in CASES])
@parametrize_backends(reference=True)
def test_what_is_not_finite_in_the_official_formula(backend, op, axes, value):
    sample = make_sample(op, at=("dense_7x7", 1), **axes)
    clean = sample.cast(F32, backend.device).run(backend.name)["out"]
    sample.tensors["x"][1, 3, 4, 0] = value
    # plain PyTorch's GELU of an infinity is NaN in float32, by the approximation of its erf
    exact = sample.cast(F32 if backend.name == "reference" else F64)
    out = official(op, exact.tensors, exact.constants)
    cotangent = cotangent_of(out, F32)
    names = [name for name, t in exact.tensors.items() if t is not None]
    grads = torch.autograd.grad(out, [exact.tensors[name] for name in names], cotangent.to(out))
    truth = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
    got = sample.cast(F32, backend.device).run(backend.name, cotangent)
    assert not torch.isfinite(truth["out"][1]).all(), "the case shows nothing"
    for name, t in truth.items():
        assert torch.equal(torch.isfinite(got[name]).cpu(), torch.isfinite(t)), f"{name} is finite at other places"
    assert torch.equal(got["out"][0], clean[0]), "another image changed"
    assert torch.isfinite(got["x"][0]).all()


@pytest.mark.parametrize("value", VALUES)
@parametrize_backends(reference=True)
def test_no_grn_is_the_identity_of_every_number(backend, value):
    sample = make_sample("global_response_norm", at=("dense_7x7", 1)).cast(F32, backend.device)
    x = sample.tensors["x"]
    with torch.no_grad():
        x[1, 3, 4, 0] = value
    with ck.use_backend(backend.name):
        out = ck.ops.global_response_norm(**sample.tensors, variant="none")
    assert torch.equal(out, x) if value == value else torch.equal(out.isnan(), x.isnan())
    assert out.data_ptr() != x.data_ptr()
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(dx, torch.ones_like(dx))
