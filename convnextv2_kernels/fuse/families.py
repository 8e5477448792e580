"""The ConvNeXt V2 blocks that can be fused: the names of their parts, and the options that prevent fusing.

Every block here computes ``x + drop_path(scale * W2 GRN(GELU(W1 LN(conv(x)) + b1)) + b2)``; the families differ in
names, in the shapes of weights and in whether they have ``scale`` (V1's layer scale). A class is recognised by its
name and its module's name, so that no library is imported that the model does not already use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

# A module of any library. Its attributes are known by its class's name only, so to a type checker it can be anything.
ForeignModule: TypeAlias = Any


class Parts(NamedTuple):
    """The inputs of a block's computation: modules whose parameters are read, and GRN's own parameters."""

    conv: ForeignModule
    norm: ForeignModule
    fc1: ForeignModule
    act: ForeignModule
    grn: ForeignModule
    fc2: ForeignModule
    drop_path: ForeignModule
    gamma: Tensor | None
    beta: Tensor | None
    layer_scale: Tensor | None
    grn_eps: float


@dataclass(frozen=True)
class Family:
    """Names of a block's parts, relative to the block; ``classes`` are its known ``module.Class`` names.

    Without ``classes`` a block is recognised by the names of its children, and a trial run decides (``trial.py``).
    ``containers`` are further modules whose forward the fused block does not call.
    """

    title: str
    classes: tuple[str, ...]
    conv: str
    norm: str
    fc1: str
    act: str
    grn: str
    fc2: str
    grn_parameters: tuple[str, str]
    why_not: Callable[[nn.Module], str | None] = lambda block: None
    layer_scale: str | None = None
    drop_path: str = "drop_path"
    containers: tuple[str, ...] = ()
    uniform_drop_path: bool = False  # see forward.drop_path_factors

    def __reduce__(self) -> tuple:
        return family_titled, (self.title,)  # one object each, in copies and pickles of fused models too

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules of :class:`Parts`, in its order."""
        return self.conv, self.norm, self.fc1, self.act, self.grn, self.fc2, self.drop_path

    def base_class(self, block: nn.Module) -> type[nn.Module] | None:
        """The class of this family that the block is an instance of."""
        if not self.classes:
            children = {name for name, _ in block.named_children()}
            return type(block) if children == set(self.names) else None
        bases = [c for c in type(block).__mro__ if issubclass(c, nn.Module)]
        return next((c for c in bases if full_name(c) in self.classes), None)

    def parts(self, block: nn.Module) -> Parts:
        """The block's parts as they are now: they may have been replaced since it was fused."""
        conv, norm, fc1, act, grn, fc2, drop_path = [_module(block, name) for name in self.names]
        gamma, beta = (getattr(grn, name, None) for name in self.grn_parameters)
        scale = None if self.layer_scale is None else getattr(block, self.layer_scale)
        return Parts(conv, norm, fc1, act, grn, fc2, drop_path, gamma, beta, scale, getattr(grn, "eps", 1e-6))

    def bypassed(self, block: nn.Module) -> list[tuple[str, nn.Module]]:
        """Name and module of everything in the block that is not called once it is fused."""
        return [(name, _module(block, name)) for name in (*self.names, *self.containers)]


def _module(block: nn.Module, name: str) -> nn.Module:
    """``block.a.b`` for the name "a.b". Reads the modules' tables directly: their own attribute look-up is slow, and
    every call of a fused block would need it a few dozen times."""
    for part in name.split("."):
        child = block._modules[part]
        assert child is not None
        block = child
    return block


def full_name(kind: type) -> str:
    """``module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def unexpected(name: str, module: nn.Module, expected: str) -> str:
    """The reason that a part of a block is of another class, which is named in full where PyTorch has its namesake."""
    kind = type(module)
    if kind.__module__.startswith("peft."):
        return (
            f"{name} is {full_name(kind)}, a layer of peft that the fused block would not run, expected {expected} "
            "(peft's merge_and_unload restores it)"
        )
    foreign = hasattr(nn, kind.__name__) and not kind.__module__.startswith("torch.")
    return f"{name} is {full_name(kind) if foreign else f'a {kind.__name__}'}, expected {expected}"


def _why_not_timm(block: ForeignModule) -> str | None:
    if type(block.mlp).__name__ != "GlobalResponseNormMlp":
        return unexpected("mlp", block.mlp, "GlobalResponseNormMlp")
    if not isinstance(block.shortcut, nn.Identity):
        return unexpected("shortcut", block.shortcut, "the identity")
    for name in ("drop1", "drop2"):
        rate = getattr(block.mlp, name).p
        if rate:
            return f"mlp.{name} drops out with rate {rate}, expected 0"
    return None


TIMM = Family(
    title="timm ConvNeXtBlock",
    classes=("timm.models.convnext.ConvNeXtBlock",),
    conv="conv_dw",
    norm="norm",
    fc1="mlp.fc1",
    act="mlp.act",
    grn="mlp.grn",
    fc2="mlp.fc2",
    grn_parameters=("weight", "bias"),
    why_not=_why_not_timm,
    layer_scale="gamma",
    containers=("mlp", "mlp.drop1", "mlp.drop2", "shortcut"),
)
TRANSFORMERS = Family(
    title="transformers ConvNextV2Layer",
    classes=("transformers.models.convnextv2.modeling_convnextv2.ConvNextV2Layer",),
    conv="dwconv",
    norm="layernorm",
    fc1="pwconv1",
    act="act",
    grn="grn",
    fc2="pwconv2",
    grn_parameters=("weight", "bias"),
    uniform_drop_path=True,
)
OFFICIAL = Family(
    title="official Block",
    classes=(),
    conv="dwconv",
    norm="norm",
    fc1="pwconv1",
    act="act",
    grn="grn",
    fc2="pwconv2",
    grn_parameters=("gamma", "beta"),
)
FAMILIES = (TIMM, TRANSFORMERS, OFFICIAL)
# What `fuse` looks for, this library's own blocks among it.
KINDS = (*(family.title for family in FAMILIES), "this library's ConvNeXtV2Block")
V1_BLOCK = "ConvNeXt V1 block"
# its blocks by class, or in the official code by the names of their children
_V1_CLASSES = ("transformers.models.convnext.modeling_convnext.ConvNextLayer", "torchvision.models.convnext.CNBlock")
_V1_CHILDREN = set(OFFICIAL.names) - {OFFICIAL.grn}
_LAYER_SCALES = ("gamma", "layer_scale_parameter", "layer_scale")


def v1_block(module: ForeignModule) -> str | None:
    """What a module is called in a report if it is a block of ConvNeXt V1, or None."""
    if TIMM.base_class(module) is not None:
        known = type(module.mlp).__name__ in ("Mlp", "ConvMlp")
    else:
        known = {name for name, _ in module.named_children()} == _V1_CHILDREN
        known |= any(full_name(c) in _V1_CLASSES for c in type(module).__mro__)
    if not known:
        return None
    scaled = any(getattr(module, name, None) is not None for name in _LAYER_SCALES)
    return f"{V1_BLOCK} ({'layer scale, ' if scaled else ''}no GRN)"


def family_titled(title: str) -> Family:
    """The family of this title."""
    return next(family for family in FAMILIES if family.title == title)


def family_of(module: nn.Module) -> Family | None:
    """The family a module is a block of."""
    return next((family for family in FAMILIES if family.base_class(module) is not None), None)
