"""Reasons not to fuse a recognised block. Every check returns the reason as half a sentence, or None."""

from __future__ import annotations

import torch.fx
from torch import nn

from .families import Family, Parts, full_name, unexpected

# modules by class name: their computation is known, whichever library defines them
LAYER_NORMS = {
    "torch.nn.modules.normalization.LayerNorm",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNorm2d",
    "timm.layers.norm.LayerNormFp32",
    "timm.layers.norm.LayerNorm2dFp32",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
}
GELUS = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
}
GRNS = {"timm.layers.grn.GlobalResponseNorm", "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2GRN"}
DROP_PATHS = {"timm.layers.drop.DropPath", "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2DropPath"}


def activation(act: nn.Module) -> str | None:
    """``act`` of :func:`~convnextv2_kernels.ops.convnextv2_block` for a module, or None if it is not a GELU."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return GELUS.get(full_name(type(act)))


def why_not(family: Family, block: nn.Module) -> str | None:
    """Reason this block of the family cannot be fused, or None."""
    base = family.base_class(block)
    assert base is not None, "a block of this family"
    if type(block).forward is not base.forward:
        return f"{type(block).__name__} overrides forward of {base.__name__}"
    if family.classes and base.forward.__module__ != base.__module__:
        return f"forward of {base.__name__} has been replaced"
    if "forward" in block.__dict__:
        return "its forward has been replaced on the instance"
    return unfit(family, block)


def unfit(family: Family, block: nn.Module) -> str | None:
    """Reason the parts of the block, as they are now, have no fused form, or None. Called in every forward."""
    reason = family.why_not(block)
    if reason is not None:
        return reason
    for name, module in family.bypassed(block):
        if "forward" in module.__dict__:
            return f"the forward of {name} has been replaced on the instance"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a hook on {name} would not run"
    parts = family.parts(block)
    reason = _why_not_conv(family.conv, parts.conv) or _why_not_classes(family, parts) or _why_not_linear(family, parts)
    if reason is not None or isinstance(parts.gamma, torch.fx.Proxy):
        return reason  # in a symbolic trace parameters are proxies without shapes and dtypes
    return _why_not_norms(family, parts) or _why_not_dtypes(family, parts)


def _why_not_conv(name: str, conv: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return unexpected(name, conv, "torch.nn.Conv2d")
    k = conv.kernel_size
    if k[0] != k[1] or k[0] % 2 == 0 or not 3 <= k[0] <= 11:
        return f"{name} has a kernel of {k[0]}x{k[1]}, expected an odd square from 3 to 11"
    if conv.dilation != (1, 1):
        return f"{name} has dilation {conv.dilation[0]}, expected 1"
    if conv.stride != (1, 1):
        return f"{name} has stride {conv.stride[0]}, expected 1"
    if conv.padding != (k[0] // 2, k[0] // 2) or conv.padding_mode != "zeros":
        return f"{name} has padding {conv.padding} ({conv.padding_mode}), expected {k[0] // 2} zeros"
    if not conv.groups == conv.in_channels == conv.out_channels:
        return f"{name} is not depthwise with as many outputs as inputs"
    return None


def _why_not_classes(family: Family, parts: Parts) -> str | None:
    if activation(parts.act) is None:
        return unexpected(family.act, parts.act, "the erf or the tanh GELU")
    if not family.classes:
        return None  # recognised by names; the trial run checks the rest
    if full_name(type(parts.norm)) not in LAYER_NORMS:
        return unexpected(family.norm, parts.norm, "LayerNorm")
    if full_name(type(parts.grn)) not in GRNS:
        return unexpected(family.grn, parts.grn, "global response normalisation")
    if not isinstance(parts.drop_path, nn.Identity) and full_name(type(parts.drop_path)) not in DROP_PATHS:
        return unexpected(family.drop_path, parts.drop_path, "DropPath or the identity")
    return None


def _why_not_linear(family: Family, parts: Parts) -> str | None:
    for name, product in ((family.fc1, parts.fc1), (family.fc2, parts.fc2)):
        if type(product) is nn.Conv2d:
            if (product.kernel_size, product.stride, product.groups) != ((1, 1), (1, 1), 1) or any(product.padding):
                return f"{name} is a convolution of {product.kernel_size}, expected 1x1"
        elif type(product) is not nn.Linear:
            return unexpected(name, product, "torch.nn.Linear or Conv2d")
        if product.bias is None:
            return f"{name} has no bias"
    return None


def _why_not_norms(family: Family, parts: Parts) -> str | None:
    channels, hidden = parts.conv.out_channels, parts.fc1.weight.shape[0]
    norm = parts.norm
    for name, tensor, size in (
        (f"{family.norm}.weight", getattr(norm, "weight", None), channels),
        (f"{family.norm}.bias", getattr(norm, "bias", None), channels),
        (f"{family.grn}.{family.grn_parameters[0]}", parts.gamma, hidden),
        (f"{family.grn}.{family.grn_parameters[1]}", parts.beta, hidden),
    ):
        if tensor is None or tensor.numel() != size:
            return f"{name} is {None if tensor is None else list(tensor.shape)}, expected {size} elements"
    for name, eps in ((family.norm, getattr(norm, "eps", None)), (family.grn, parts.grn_eps)):
        if not isinstance(eps, float) or eps < 0:
            return f"{name} has eps {eps}, expected a number"
    if parts.grn_eps == 0:
        return f"{family.grn} has eps 0, expected more"
    if not isinstance(parts.drop_path, nn.Identity) and not hasattr(parts.drop_path, "drop_prob"):
        return f"{family.drop_path} is a {type(parts.drop_path).__name__} without a drop_prob"
    return None


def _why_not_dtypes(family: Family, parts: Parts) -> str | None:
    """A model may keep its norms in float32 and the rest in bfloat16; the fused block takes one dtype."""
    dtype = parts.conv.weight.dtype
    for name, tensor in (
        (family.norm, parts.norm.weight),
        (family.fc1, parts.fc1.weight),
        (family.grn, parts.gamma),
        (family.fc2, parts.fc2.weight),
        (family.layer_scale, parts.layer_scale),
    ):
        if tensor is not None and tensor.dtype != dtype:
            return f"{name} is {tensor.dtype} beside {dtype} of {family.conv}, expected one dtype"
    return None
