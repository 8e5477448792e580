"""The layers a ConvNeXt V2 block is made of, one module each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import PatchLayout
from ..ops._checks import check_positive, check_scope
from ..ops._grn_variant import GRNVariant
from .init import init_linear_map


class SubmanifoldDepthwiseConv2d(nn.Module):
    """Depthwise ``K x K`` convolution of stride 1 whose output has the visible sites of its
    input.

    Hidden sites and sites outside the image count as zero; the bias reaches visible sites only.
    ``weight [C, 1, K, K]``, ``bias [C]`` or ``None``.

    Args:
        dim: C. kernel_size: K, odd, 3 to 11. bias: whether there is one.

    Raises:
        ValueError: ``dim`` or ``kernel_size`` out of range.
    """

    def __init__(self, dim: int, kernel_size: int = 7, bias: bool = True):
        super().__init__()
        self.dim = check_positive("dim", dim)
        if kernel_size not in (3, 5, 7, 9, 11):
            raise ValueError(f"kernel_size must be odd and between 3 and 11, got {kernel_size!r}")
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, set the bias to zero."""
        init_linear_map(self)

    def forward(self, x: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """``x [P, s, s, C]`` packed, or dense ``[N, H, W, C]`` without a layout -> the same shape
        and dtype."""
        return ops.submanifold_depthwise_conv2d(x, self.weight, self.bias, layout)

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernel_size}, bias={self.bias is not None}"


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, that is over the channels of each site; ``weight``, ``bias
    [C]``."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.dim = check_positive("dim", dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """``x [..., C]`` -> the same shape and dtype. Rows are independent, so the layout does not
        matter."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class GlobalResponseNorm(nn.Module):
    """Global Response Normalization (ConvNeXt V2 paper, section 4, Algorithm 1).

    ``gamma``, ``beta [1, 1, 1, C]`` start at zero, which makes the layer the identity; gamma starts at one in a variant
    without skip.

    Args:
        dim: C.
        eps: added to the mean of the norms.
        scope: ``"image"`` takes the norm over the visible sites of each image (the paper),
            ``"batch"`` over the visible sites of all images together (the official sparse code).
        variant: an ablation, see :class:`.GRNVariant`, or its text. One that is neither "default" nor "none" is
            computed in plain PyTorch. With "none" the layer is the identity, whatever its parameters hold; they start
            at zero and need no gradient.
        affine: whether there are parameters; False, for "none" only, leaves gamma and beta None.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        scope: str = "image",
        variant: str | GRNVariant = "default",
        affine: bool = True,
    ):
        super().__init__()
        self.dim = check_positive("dim", dim)
        self.eps = eps
        self.scope = check_scope(scope)
        self.variant = GRNVariant.of(variant)
        trained = self.variant.enabled
        if trained and not affine:
            raise ValueError(f"affine must be True for the GRN variant '{self.variant}', got {affine!r}")
        self.gamma = nn.Parameter(torch.empty(1, 1, 1, dim), requires_grad=trained) if affine else None
        self.beta = nn.Parameter(torch.empty(1, 1, 1, dim), requires_grad=trained) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """beta zero; gamma zero, or one without skip."""
        if self.gamma is None or self.beta is None:
            return
        nn.init.constant_(self.gamma, 0.0 if self.variant.skip else 1.0)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """``x [P, s, s, C]`` packed, or dense ``[N, H, W, C]`` without a layout -> the same shape
        and dtype.

        Raises:
            RuntimeError: a variant that only the reference has, and another backend is forced.
        """
        if self.gamma is None or self.beta is None:
            return x
        return ops.global_response_norm(
            x, self.gamma, self.beta, layout, scope=self.scope, eps=self.eps, variant=self.variant
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Loading a trained GRN into a layer without GRN is an error: the model would compute something else."""
        for name in ("gamma", "beta"):
            value = state_dict.get(prefix + name)
            if not self.variant.enabled and value is not None and not value.is_meta and bool(value.any()):
                error_msgs.append(f"{prefix}{name} must be zero for the GRN variant 'none', got other values")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        variant = "" if self.variant == GRNVariant() else f", variant='{self.variant}'"
        return f"{self.dim}, eps={self.eps}, scope={self.scope!r}{variant}"


class PointwiseMLP(nn.Module):
    """``W2 GRN(GELU(W1 x + b1)) + b2`` on every site: the second half of a block, as one operation.

    ``pwconv1`` and ``pwconv2`` only hold the weights ``[H, C]`` and ``[C, H]``.

    Args:
        dim: C. hidden: H, 4C where not given. scope: see :class:`GlobalResponseNorm`.
    """

    def __init__(self, dim: int, hidden: int | None = None, scope: str = "image"):
        super().__init__()
        check_positive("dim", dim)
        hidden = 4 * dim if hidden is None else check_positive("hidden", hidden)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.grn = GlobalResponseNorm(hidden, scope=scope)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, set the biases to zero and GRN to the identity."""
        init_linear_map(self.pwconv1)
        self.grn.reset_parameters()
        init_linear_map(self.pwconv2)

    def forward(
        self,
        x: Tensor,
        layout: PatchLayout | None = None,
        residual: Tensor | None = None,
        drop_path_scale: Tensor | None = None,
    ) -> Tensor:
        """``x [P, s, s, C]`` packed, or dense ``[N, H, W, C]`` without a layout -> the same shape.

        ``residual`` (shape of x) is added to the result, after each image's result was multiplied
        by its entry of ``drop_path_scale [N]``.
        """
        return ops.pointwise_mlp(
            x,
            self.pwconv1.weight,
            self.pwconv1.bias,
            self.grn.gamma,
            self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
            layout,
            residual=residual,
            drop_path_scale=drop_path_scale,
            scope=self.grn.scope,
        )
