"""What ops, schedule and backends hand to each other: the Python twins of the structs in ``csrc/include/cnx/params.h``.

Notation: M rows, C channels in, H hidden, O out, N images, P visible patches, T the dtype of GEMM operands; a
*statistic* is float32, float64 for float64 features (:func:`~convnextv2_kernels.dtypes.statistics_dtype`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import cast
from .layout import PatchLayout


class Segments(NamedTuple):
    """How rows fall into segments, the images of a batch or of a chunk: ``count`` equal shares where ``offsets`` is
    None, else segment i holds rows ``rows_per_slot * (offsets[i] - offsets[0])`` up to the next.

    ``offsets [count + 1]``: int32, on the device of the rows."""

    offsets: Tensor | None
    rows_per_slot: int
    count: int  # type: ignore[assignment]  # hides tuple's method, as the struct's field is called

    @classmethod
    def of(cls, x: Tensor, layout: PatchLayout | None, scope: str = "image") -> Segments:
        """How the rows of ``x``, packed by a layout or dense without one, fall into images; for ``scope`` "batch" into
        one segment."""
        if scope == "batch":
            return WHOLE_BATCH
        if layout is None:
            return cls(None, 1, x.shape[0])
        offsets = None if layout.patches_per_image is not None else layout.image_offsets
        return cls(offsets, x.shape[1] * x.shape[2], layout.num_images)

    def rows_each(self, rows: int) -> int | None:
        """Rows of every segment, or None where they may differ."""
        return rows // self.count if self.offsets is None and self.count else None

    def images(self, first: int, last: int) -> Segments:
        """The images ``first:last`` of a batch."""
        offsets = None if self.offsets is None else self.offsets[first : last + 1]
        return Segments(offsets, self.rows_per_slot, last - first)


WHOLE_BATCH = Segments(None, 1, 1)


class Places(NamedTuple):
    """Where packed rows lie in a dense map ``[N, Gh * side, Gw * side, C]``: the patch of each of their slots,
    ``patch_of_slot [P]`` int32, each patch at most once, in the grid ``(Gh, Gw)``."""

    patch_of_slot: Tensor
    grid: tuple[int, int]
    side: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.patch_of_slot.shape[0] * self.side**2

    def of_rows(self, first: int, last: int) -> Places:
        """The places of the rows ``first:last``, whole patches: a view of the table."""
        area = self.side**2
        return self._replace(patch_of_slot=self.patch_of_slot[first // area : last // area])


class RowNorm(NamedTuple):
    """LayerNorm of rows as they are read: its affine part ``[C]``, statistics, or None, and its eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class ConvParams(NamedTuple):
    """``weight [C, 1, K, K]``, ``bias [C]``."""

    weight: Tensor
    bias: Tensor | None


class NormParams(NamedTuple):
    """The affine part of LayerNorm, ``weight`` and ``bias [C]``: ``y = z * weight + bias`` of normalised rows z."""

    weight: Tensor
    bias: Tensor

    def apply(self, z: Tensor) -> Tensor:
        return torch.addcmul(cast(self.bias, z.dtype), z, cast(self.weight, z.dtype))


class MLPParams(NamedTuple):
    """``GRN(act(x w1' + b1)) w2' + b2``: ``w1 [H, C]``, ``b1 [H]``, GRN's gamma and beta (H elements), ``w2 [O, H]``,
    ``b2 [O]``, which backward does without."""

    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    b2: Tensor | None


class MLPOptions(NamedTuple):
    """``act``: "gelu" or "gelu_tanh". ``eps``: of GRN. ``batch_scope``: GRN sees the batch as one segment. ``save``: a
    policy of :data:`~convnextv2_kernels.schedule.SAVE_POLICIES`. ``dtype``: T."""

    act: str
    eps: float
    batch_scope: bool
    save: str
    dtype: torch.dtype

    def segments(self, images: Segments) -> Segments:
        """GRN's segments."""
        return WHOLE_BATCH if self.batch_scope else images


class MLPRows(NamedTuple):
    """Rows of whole images, of a batch or of a chunk, that an MLP is applied to.

    ``x [M, C]`` of dtype T; ``residual [M, O]``, ``drop_path_scale [N]`` or None; ``out_dtype`` of the result;
    ``hidden [M, H]``: where the first GEMM's output is to be saved, None for a tensor of its own. With ``places`` x is
    a dense map, of any floating-point dtype, and the rows are those that lie there."""

    x: Tensor
    residual: Tensor | None
    drop_path_scale: Tensor | None
    images: Segments
    out_dtype: torch.dtype
    hidden: Tensor | None = None
    places: Places | None = None

    @property
    def total(self) -> int:
        """M."""
        return self.x.shape[0] if self.places is None else self.places.rows


class MLPResult(NamedTuple):
    """``out [M, O]``; GRN's ``norm [segments, H]``; ``hidden [M, H]``, the first GEMM's output, if the policy saves
    it."""

    out: Tensor
    norm: Tensor
    hidden: Tensor | None


class MLPGradRows(NamedTuple):
    """What the backward pass of a chunk starts from.

    ``a [M, H]``: the first GEMM's output, to be preserved if ``preserve_a``. ``d [M, O]``: the gradient of the MLP's
    result, ``d_sum [O]`` its column sums. ``norm [segments, H]``: of GRN. With LayerNorm in front: its normalised rows
    ``z [M, C]``, ``rstd [M]``, and ``ln_weight [C]``, None where it is folded into w1. With ``places`` the gradient is
    written there in ``dx``, a dense map of any floating-point dtype, in which z is too."""

    a: Tensor
    d: Tensor
    d_sum: Tensor
    norm: Tensor
    z: Tensor | None
    rstd: Tensor | None
    ln_weight: Tensor | None
    images: Segments
    preserve_a: bool
    places: Places | None = None
    dx: Tensor | None = None


class MLPGradResult(NamedTuple):
    """Gradients of a chunk: ``da [M, H]``; ``dx [M, C]`` of the MLP's input, or with z of what was normalised, None
    where it was written to its places; statistics ``db1``, ``dgamma [H]``, ``dw2 [O, H]``, and ``dln_weight``,
    ``dln_bias [C]`` or None."""

    da: Tensor
    dx: Tensor | None
    db1: Tensor
    dgamma: Tensor
    dw2: Tensor
    dln_weight: Tensor | None = None
    dln_bias: Tensor | None = None


# The arguments of the composite operators ``torch.ops.convnextv2_kernels.{mlp,gathered_mlp,block}_{forward,backward}``.
# The order of the fields is the order of the schema, which is made from them. ``factors`` is drop path's,
# ``neighbours`` and ``eps`` are of the convolution and of LayerNorm. Backward ignores ``save``: the saved tensors tell.


class MLPForwardArgs(NamedTuple):
    x: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    b2: Tensor
    residual: Tensor | None
    factors: Tensor | None
    offsets: Tensor | None
    rows_per_slot: int
    images: int
    batch_scope: bool
    act: str
    grn_eps: float
    save: str
    dtype: torch.dtype
    backend: str

    @property
    def segments(self) -> Segments:
        return Segments(self.offsets, self.rows_per_slot, self.images)

    @property
    def options(self) -> MLPOptions:
        return MLPOptions(self.act, self.grn_eps, self.batch_scope, self.save, self.dtype)

    @property
    def mlp(self) -> MLPParams:
        return MLPParams(self.w1, self.b1, self.gamma, self.beta, self.w2, self.b2)


class MLPBackwardArgs(NamedTuple):
    dout: Tensor
    x: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    factors: Tensor | None
    offsets: Tensor | None
    norms: Tensor
    hidden: Tensor
    rows_per_slot: int
    images: int
    batch_scope: bool
    act: str
    grn_eps: float
    save: str
    dtype: torch.dtype
    backend: str

    @property
    def segments(self) -> Segments:
        return Segments(self.offsets, self.rows_per_slot, self.images)

    @property
    def options(self) -> MLPOptions:
        return MLPOptions(self.act, self.grn_eps, self.batch_scope, self.save, self.dtype)

    @property
    def mlp(self) -> MLPParams:
        return MLPParams(self.w1, self.b1, self.gamma, self.beta, self.w2, None)


class GatheredMLPForwardArgs(NamedTuple):
    x: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    b2: Tensor
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    residual: Tensor | None
    factors: Tensor | None
    patch_of_slot: Tensor
    offsets: Tensor | None
    grid_h: int
    grid_w: int
    batch_scope: bool
    act: str
    grn_eps: float
    eps: float
    dtype: torch.dtype
    backend: str

    @property
    def segments(self) -> Segments:
        return Segments(self.offsets, self.places.side**2, self.x.shape[0])

    @property
    def options(self) -> MLPOptions:
        return MLPOptions(self.act, self.grn_eps, self.batch_scope, "inputs", self.dtype)

    @property
    def places(self) -> Places:
        return Places(self.patch_of_slot, (self.grid_h, self.grid_w), self.x.shape[1] // self.grid_h)

    @property
    def layer_norm(self) -> NormParams | None:
        return None if self.ln_weight is None or self.ln_bias is None else NormParams(self.ln_weight, self.ln_bias)

    @property
    def mlp(self) -> MLPParams:
        return MLPParams(self.w1, self.b1, self.gamma, self.beta, self.w2, self.b2)


class GatheredMLPBackwardArgs(NamedTuple):
    dout: Tensor
    x: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    factors: Tensor | None
    patch_of_slot: Tensor
    offsets: Tensor | None
    norms: Tensor
    grid_h: int
    grid_w: int
    batch_scope: bool
    act: str
    grn_eps: float
    eps: float
    dtype: torch.dtype
    backend: str

    @property
    def segments(self) -> Segments:
        return Segments(self.offsets, self.places.side**2, self.x.shape[0])

    @property
    def options(self) -> MLPOptions:
        return MLPOptions(self.act, self.grn_eps, self.batch_scope, "inputs", self.dtype)

    @property
    def places(self) -> Places:
        return Places(self.patch_of_slot, (self.grid_h, self.grid_w), self.x.shape[1] // self.grid_h)

    @property
    def layer_norm(self) -> NormParams | None:
        return None if self.ln_weight is None or self.ln_bias is None else NormParams(self.ln_weight, self.ln_bias)

    @property
    def mlp(self) -> MLPParams:
        return MLPParams(self.w1, self.b1, self.gamma, self.beta, self.w2, None)


class BlockForwardArgs(NamedTuple):
    x: Tensor
    dw_weight: Tensor
    dw_bias: Tensor | None
    ln_weight: Tensor
    ln_bias: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    b2: Tensor
    neighbours: Tensor | None
    factors: Tensor | None
    offsets: Tensor | None
    eps: float
    rows_per_slot: int
    images: int
    batch_scope: bool
    act: str
    grn_eps: float
    save: str
    dtype: torch.dtype
    backend: str

    @property
    def segments(self) -> Segments:
        return Segments(self.offsets, self.rows_per_slot, self.images)

    @property
    def options(self) -> MLPOptions:
        return MLPOptions(self.act, self.grn_eps, self.batch_scope, self.save, self.dtype)

    @property
    def conv(self) -> ConvParams:
        return ConvParams(self.dw_weight, self.dw_bias)

    @property
    def layer_norm(self) -> NormParams:
        return NormParams(self.ln_weight, self.ln_bias)

    @property
    def mlp(self) -> MLPParams:
        return MLPParams(self.w1, self.b1, self.gamma, self.beta, self.w2, self.b2)


class BlockBackwardArgs(NamedTuple):
    dout: Tensor
    x: Tensor
    z: Tensor
    rstd: Tensor
    norms: Tensor
    hidden: Tensor
    dw_weight: Tensor
    dw_bias: Tensor | None
    ln_weight: Tensor
    ln_bias: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    neighbours: Tensor | None
    factors: Tensor | None
    offsets: Tensor | None
    eps: float
    rows_per_slot: int
    images: int
    batch_scope: bool
    act: str
    grn_eps: float
    save: str
    dtype: torch.dtype
    backend: str

    @property
    def segments(self) -> Segments:
        return Segments(self.offsets, self.rows_per_slot, self.images)

    @property
    def options(self) -> MLPOptions:
        return MLPOptions(self.act, self.grn_eps, self.batch_scope, self.save, self.dtype)

    @property
    def conv(self) -> ConvParams:
        return ConvParams(self.dw_weight, self.dw_bias)

    @property
    def layer_norm(self) -> NormParams:
        return NormParams(self.ln_weight, self.ln_bias)

    @property
    def mlp(self) -> MLPParams:
        return MLPParams(self.w1, self.b1, self.gamma, self.beta, self.w2, None)
