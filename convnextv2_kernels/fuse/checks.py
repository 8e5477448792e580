"""What keeps a recognised block from being fused. Every check returns the reason as half a sentence, or None."""

from __future__ import annotations

from torch import nn

from .families import Family, Parts

# modules by the names of their classes: what they compute is known, whoever made them
LAYER_NORMS = {
    "torch.nn.modules.normalization.LayerNorm",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNorm2d",
    "timm.layers.norm.LayerNormFp32",
    "timm.layers.norm.LayerNorm2dFp32",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
}
GELUS = {
    "torch.nn.modules.activation.GELU": None,  # erf or tanh, by its attribute
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
}
GRNS = {
    "timm.layers.grn.GlobalResponseNorm",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2GRN",
}
DROP_PATHS = {
    "timm.layers.drop.DropPath",
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2DropPath",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def activation(act: nn.Module) -> str | None:
    """``act`` of :func:`~convnextv2_kernels.ops.convnextv2_block` for a module, or None if it is no GELU."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return GELUS.get(qualified_name(act))


def hooked(family: Family, block: nn.Module) -> str | None:
    """Name of a module inside the block whose hooks would not run once it is fused."""
    for name, module in family.bypassed(block):
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return name
    return None


def why_not(family: Family, block: nn.Module) -> str | None:
    """Reason this block of the family cannot be fused, or None."""
    base = family.base_class(block)
    if type(block).forward is not base.forward:
        return f"{type(block).__name__} overrides forward of {base.__name__}"
    if "forward" in block.__dict__:
        return "its forward has been replaced on the instance"
    reason = family.why_not(block)
    if reason is not None:
        return reason
    name = hooked(family, block)
    if name is not None:
        return f"a hook on {name} would not run"
    parts = family.parts(block)
    return (
        _why_not_conv(family.conv, parts.conv)
        or _why_not_classes(family, parts)
        or _why_not_products(family, parts)
        or _why_not_norms(family, parts)
    )


def _why_not_conv(name: str, conv: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"{name} is a {type(conv).__name__}, expected torch.nn.Conv2d"
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
        return f"{family.act} is a {type(parts.act).__name__}, expected the erf or the tanh GELU"
    if not family.classes:
        return None  # recognised by names; the trial run looks at what the rest computes
    if qualified_name(parts.norm) not in LAYER_NORMS:
        return f"{family.norm} is a {type(parts.norm).__name__}, expected LayerNorm"
    if qualified_name(parts.grn) not in GRNS:
        return f"{family.grn} is a {type(parts.grn).__name__}, expected global response normalisation"
    if not isinstance(parts.drop_path, nn.Identity) and qualified_name(parts.drop_path) not in DROP_PATHS:
        return f"{family.drop_path} is a {type(parts.drop_path).__name__}, expected DropPath or the identity"
    return None


def _why_not_products(family: Family, parts: Parts) -> str | None:
    for name, product in ((family.fc1, parts.fc1), (family.fc2, parts.fc2)):
        if type(product) is nn.Conv2d:
            if (product.kernel_size, product.stride, product.groups) != ((1, 1), (1, 1), 1) or any(product.padding):
                return f"{name} is a convolution of {product.kernel_size}, expected 1x1"
        elif type(product) is not nn.Linear:
            return f"{name} is a {type(product).__name__}, expected torch.nn.Linear or Conv2d"
        if product.bias is None:
            return f"{name} has no bias"
    return None


def _why_not_norms(family: Family, parts: Parts) -> str | None:
    channels, hidden = parts.conv.out_channels, parts.fc1.weight.shape[0]
    for name, tensor, size in (
        (f"{family.norm}.weight", parts.norm.weight, channels),
        (f"{family.norm}.bias", parts.norm.bias, channels),
        (f"{family.grn}.{family.grn_parameters[0]}", parts.gamma, hidden),
        (f"{family.grn}.{family.grn_parameters[1]}", parts.beta, hidden),
    ):
        if tensor is None or tensor.numel() != size:
            return f"{name} is {None if tensor is None else list(tensor.shape)}, expected {size} elements"
    if not parts.grn_eps > 0:
        return f"{family.grn} has eps {parts.grn_eps:g}, expected more than 0"
    if not isinstance(parts.drop_path, nn.Identity) and not hasattr(parts.drop_path, "drop_prob"):
        return f"{family.drop_path} is a {type(parts.drop_path).__name__} without a drop_prob"
    return None
