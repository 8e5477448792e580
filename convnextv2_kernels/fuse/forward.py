"""The forward of a fused block: one call of :func:`convnextv2_kernels.ops.convnextv2_block`.

It is put on the instance, as ``block.forward``. The block's class, parameters, buffers, hooks and names stay what they
were, so everything that wraps, shards, copies or saves the model still works.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TypeAlias

import torch
import torch.fx
from torch import Tensor, nn

from .. import ops
from ..dtypes import gemm_dtype
from ..tracing import exporting
from .checks import activation, unfit
from .families import Family

# Plain tuples, which every version of torch.fx can hold in a graph.
_Norm: TypeAlias = tuple[Tensor, Tensor, float]
_DropPath: TypeAlias = tuple[float, bool, bool]
_Conv: TypeAlias = tuple[Tensor, Tensor | None]
_First: TypeAlias = tuple[Tensor, Tensor, str]
_Second: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
_Arguments: TypeAlias = tuple[_Conv, _Norm, _First, _Norm, _Second, _DropPath]


@torch.fx.wrap
def fused_block(
    x: Tensor, conv: _Conv, norm: _Norm, fc1: _First, grn: _Norm, fc2: _Second, drop_path: _DropPath, save: str | None
) -> Tensor:
    """``x [N, C, H, W]`` -> the same shape and dtype, in channels-last strides; one node to torch.fx.

    Args:
        conv, fc1, fc2: weight and bias; weights of fc1 and fc2 as ``[out, in]`` or as 1x1 kernels. After fc1 its
            activation, after fc2 layer scale ``[C]``, which multiplies the MLP's result, or None.
        norm, grn: weight, bias and eps of LayerNorm and of GRN.
        save, the activation: see :func:`convnextv2_kernels.ops.convnextv2_block`.
        drop_path: see :func:`drop_path_factors`; a rate of 0 drops nothing.
    """
    x = x.permute(0, 2, 3, 1)
    factors = drop_path_factors(x, *drop_path) if drop_path[0] else None
    w1, b1, w2, b2 = fc1[0].flatten(1), fc1[1], fc2[0].flatten(1), fc2[1]
    act, layer_scale = fc1[2], fc2[2]
    mlp = (w1, b1, grn[0], grn[1])
    if layer_scale is not None and gemm_dtype(x) == torch.float16:
        # layer scale may start at 1e-6: float16 cannot hold its product with a weight
        y = ops.depthwise_conv_layer_norm(x, *conv, *norm[:2], eps=norm[2])
        y = layer_scale * ops.pointwise_mlp(y, *mlp, w2, b2, act=act, eps=grn[2])
        y = y if factors is None else y * factors.view(-1, 1, 1, 1)
        return (x + y).to(x.dtype).permute(0, 3, 1, 2)
    if layer_scale is not None:
        w2, b2 = w2 * layer_scale[:, None], b2 * layer_scale
    y = ops.convnextv2_block(
        x, *conv, *norm[:2], *mlp, w2, b2, drop_path_scale=factors, act=act, eps=norm[2], grn_eps=grn[2], save=save
    )
    return y.permute(0, 3, 1, 2)


def drop_path_factors(x: Tensor, rate: float, scale_by_keep: bool, uniform: bool) -> Tensor:
    """``[N]``: 0 with probability ``rate``, else 1, or ``1 / (1 - rate)`` with ``scale_by_keep``.

    The draws equal the block's own drop path from the same random state: timm draws Bernoulli variables,
    transformers rounds ``uniform`` ones.
    """
    keep, n = 1.0 - rate, x.shape[0]
    if uniform:  # in the dtype of the branch
        return (torch.rand(n, dtype=gemm_dtype(x), device=x.device) + keep).floor_().div_(keep)
    factors = x.new_empty(n).bernoulli_(keep)
    return factors.div_(keep) if scale_by_keep and keep > 0 else factors


def block_arguments(family: Family, block: nn.Module) -> _Arguments:
    """Arguments of :func:`fused_block` between x and save, from the block's current state."""
    parts = family.parts(block)
    conv, norm, fc1, fc2 = parts.conv, parts.norm, parts.fc1, parts.fc2
    rate = 0.0
    if parts.drop_path.training and not isinstance(parts.drop_path, nn.Identity):
        rate = float(parts.drop_path.drop_prob or 0.0)
    act = activation(parts.act)
    assert act is not None and parts.gamma is not None and parts.beta is not None  # as checks.py has found
    return (
        (conv.weight, conv.bias),
        (norm.weight, norm.bias, norm.eps),
        (fc1.weight, fc1.bias, act),
        (parts.gamma, parts.beta, parts.grn_eps),
        (fc2.weight, fc2.bias, parts.layer_scale),
        (rate, getattr(parts.drop_path, "scale_by_keep", True), family.uniform_drop_path),
    )


class FusedForward:
    """Callable that replaces a block's forward.

    It refers to its block weakly, so that a model is freed when it is dropped, and finds its block again in a copy or
    a pickle. If the block has changed in a way that the fused form does not support (a hook was added, a layer was
    replaced), it runs the block's own forward and warns once.

    Attributes:
        save: see :func:`convnextv2_kernels.ops.convnextv2_block`; may be changed between calls.
    """

    def __init__(self, block: nn.Module, family: Family, save: str | None):
        self._block = weakref.ref(block)
        self._family = family
        self.save = save
        self._warned = False

    def __reduce__(self) -> tuple:
        # deepcopy and pickle have the block in their memo by now, so this resolves to the copy
        return FusedForward, (self.block, self._family, self.save)

    @property
    def block(self) -> nn.Module:
        block = self._block()
        if block is None:
            raise RuntimeError(
                "the block of this fused forward is gone: it was copied by copy.copy, or its forward taken from it; "
                "use copy.deepcopy, or keep the block"
            )
        return block

    @property
    def __globals__(self):  # the first attribute of a forward that torch.jit.script reads
        raise AttributeError("torch.jit.script cannot compile a fused block: call convnextv2_kernels.unfuse first")

    def __call__(self, *args, **kwargs) -> Tensor:
        block = self.block
        inputs = (*args, *kwargs.values())
        x = inputs[0] if len(inputs) == 1 else None
        # The block's own forward: with more arguments than a map, on the meta device, and in an export to ONNX or
        # TorchScript, which must contain PyTorch's operators only.
        plain = exporting() if torch.compiler.is_compiling() else torch._C._is_tracing()
        if x is None or plain or (isinstance(x, Tensor) and x.is_meta):
            return type(block).forward(block, *args, **kwargs)
        reason = unfit(self._family, block)
        if reason is not None:
            self._warn(block, reason)
            return type(block).forward(block, *args, **kwargs)
        return fused_block(x, *block_arguments(self._family, block), self.save)

    def unfit(self) -> str | None:
        """Why the block, as it is now, runs its own forward, or None."""
        return unfit(self._family, self.block)

    def _warn(self, block: nn.Module, reason: str) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"a fused {type(block).__name__} has changed and runs unfused ({reason}); unfuse it to silence this",
                stacklevel=4,
            )

    def replicate(self) -> nn.Module:
        """``_replicate_for_data_parallel`` of the block: its replica gets a fused forward of its own."""
        block = self.block
        replica = type(block)._replicate_for_data_parallel(block)
        install(replica, FusedForward(replica, self._family, self.save))
        return replica


def install(block: nn.Module, forward: FusedForward) -> None:
    """Put a fused forward on an instance."""
    # attributes of the instance hide the methods of its class
    block.__dict__.update(forward=forward, _replicate_for_data_parallel=forward.replicate)


def installed(block: nn.Module) -> FusedForward | None:
    """The fused forward of a module, if it has one."""
    forward = block.__dict__.get("forward")
    return forward if isinstance(forward, FusedForward) else None


def remove(block: nn.Module) -> None:
    """Undo :func:`install`: the forward of the block's class applies again."""
    del block.forward
    del block._replicate_for_data_parallel
