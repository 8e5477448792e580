"""Layers of other sparse convolution engines as variants of the op benchmark; :mod:`.engines` says which are timed.

What is timed is one call of the engine's own layer on a sparse tensor around our packed rows, and autograd's backward
of it. Every engine gets what helps it: coordinates and kernel maps are built beforehand and kept for reuse, as each of
them can (in training they are built again for every mask), the weight lies in memory in the engine's own order, so that
no copy is made, and rows are reordered, in the timed part, only where the engine changes their order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Params, Sites
from .measure import OpCase, OpVariant, pack

# Of rows [R, C] in the engine's order, the weight and the bias; returns rows [R, C] in the same order.
Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class EngineVariant(OpVariant):
    """An variant of another engine; not ``comparable`` where it computes another operation than ours."""

    comparable: bool = True


def site_coordinates(mask: Tensor, side: int) -> Tensor:
    """(image, row, column) of every visible site, [R, 3] int64, in the order of the packed rows.

    Args:
        mask: [N, Gh, Gw] bool, True = hidden.
        side: sites along one side of a patch.
    """
    patches = (~mask).nonzero()[:, None]
    within = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    image = patches[..., :1].expand(-1, side * side, -1)
    return torch.cat([image, patches[..., 1:] * side + within], dim=2).flatten(0, 1)


def row_orders(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Indices (to_theirs, to_ours) such that ``ours[to_theirs]`` is ``theirs`` and back; None when they are the same.

    Args:
        ours, theirs: coordinates [R, 3]. Raises ValueError where they are not the same set of distinct sites.
    """
    theirs = theirs.to(ours.dtype)
    if torch.equal(ours, theirs):
        return None
    (sites, our_rows), (other, their_rows) = (torch.unique(c, dim=0, return_inverse=True) for c in (ours, theirs))
    if not len(ours) == len(theirs) == len(sites) or not torch.equal(sites, other):
        raise ValueError(f"the engine holds {len(theirs)} sites that are not the {len(ours)} visible ones")
    # argsort turns "place of each row among the sites" into "row of each site".
    return our_rows.argsort()[their_rows], their_rows.argsort()[our_rows]


def _bind(case: OpCase, weight: Tensor, sites: Tensor, convolve: Convolve, comparable: bool = True) -> EngineVariant:
    """Arm of an engine that holds ``sites`` [R, 3], on packed patches as ours; builds the engine's kernel maps."""
    x, bias = pack(case.x, case.mask), case.parameters["bias"].clone()
    # The weight is not cloned: its strides are the engine's.
    leaves = {k: v.detach().requires_grad_() for k, v in {"x": x, "weight": weight, "bias": bias}.items()}
    orders = row_orders(site_coordinates(case.mask, case.side), sites)

    def call(leaves: dict[str, Tensor]) -> Tensor:
        rows = leaves["x"].flatten(0, 2)
        if orders is not None:
            rows = rows.index_select(0, orders[0])
        rows = convolve(rows, leaves["weight"], leaves["bias"])
        if orders is not None:
            rows = rows.index_select(0, orders[1])
        return rows.view(x.shape)

    with torch.no_grad():
        call(leaves)
    return EngineVariant(
        call=call, leaves=leaves, cotangent=pack(case.cotangent, case.mask), autocast=False, comparable=comparable
    )


def _tap_major(weight: Tensor) -> Tensor:
    """A depthwise weight [C, 1, k, k] of the same values that lies in memory as [k, k, C]."""
    return weight.flatten(1).t().contiguous().t().view(weight.shape)


def _taps(weight: Tensor) -> Tensor:
    """The view [k*k, C] of such a weight, taps by row and then column."""
    return weight.flatten(1).t()


def _release(module: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Drop the parameters of a layer, so that views of our leaves can be set in their place without a copy."""
    for name, shape in shapes.items():
        found = tuple(getattr(module, name).shape)
        if found != shape:
            raise ValueError(f"{type(module).__name__}.{name} has shape {found}, expected {shape}")
        delattr(module, name)


def minkowski_engine(case: OpCase) -> EngineVariant:
    """``MinkowskiChannelwiseConvolution``: PyTorch calls, tap by tap, on a kernel map that its manager keeps.

    Timed: the layer, with a ``SparseTensor`` made of our rows and the key of a coordinate map inserted beforehand.
    """
    import MinkowskiEngine as ME

    weight = _tap_major(case.parameters["weight"])
    c, k = weight.shape[0], weight.shape[-1]
    conv = ME.MinkowskiChannelwiseConvolution(c, kernel_size=k, bias=True, dimension=2)
    _release(conv, kernel=(k * k, c), bias=(1, c))
    # Its taps run fastest along the first axis: with the column first they are in our order.
    sites = site_coordinates(case.mask, case.side)[:, [0, 2, 1]].int().contiguous()
    inserted = ME.SparseTensor(torch.zeros(len(sites), 1), sites)
    key, manager = inserted.coordinate_map_key, inserted.coordinate_manager

    def convolve(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        conv.kernel, conv.bias = _taps(weight), bias[None]
        return conv(ME.SparseTensor(rows, coordinate_map_key=key, coordinate_manager=manager)).F

    return _bind(case, weight, manager.get_coordinates(key)[:, [0, 2, 1]], convolve)


def sparse_conv_net(case: OpCase) -> EngineVariant:
    """``SubmanifoldConvolution`` with one group a channel; the tensor's metadata keeps its rules for reuse.

    Written from the interface in the project's sources, and tested against a stand-in for it; the package is not on
    PyPI. Timed: the layer, on a ``SparseConvNetTensor`` made of our rows and metadata filled beforehand by
    ``InputLayer`` in mode 0 (no duplicates).
    """
    import sparseconvnet as scn

    weight = _tap_major(case.parameters["weight"])
    c, k = weight.shape[0], weight.shape[-1]
    conv = scn.SubmanifoldConvolution(2, c, c, k, True, groups=c)
    _release(conv, weight=(k * k, c, 1, 1), bias=(c,))
    sites = site_coordinates(case.mask, case.side)[:, [1, 2, 0]].contiguous()  # its batch index comes last
    size = torch.tensor(case.x.shape[1:3])
    filled = scn.InputLayer(2, size, mode=0)((sites, torch.zeros(len(sites), 1), len(case.mask)))

    def convolve(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        conv.weight, conv.bias = _taps(weight)[..., None, None], bias
        tensor = scn.SparseConvNetTensor(features=rows, metadata=filled.metadata, spatial_size=filled.spatial_size)
        return conv(tensor).features

    return _bind(case, weight, filled.get_spatial_locations()[:, [2, 0, 1]], convolve)


def full_channel_case(case: OpCase) -> OpCase:
    """The inputs of ``case`` for a convolution that mixes all channels: weight [C, C, k, k], dense ones to match."""
    c, _, k, _ = case.parameters["weight"].shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(c, c, k, k, generator=generator) * (c * k * k) ** -0.5

    def convolve(x: Tensor, p: Params, at: Sites) -> Tensor:
        return F.conv2d(x, p["weight"], p["bias"], padding=k // 2).permute(0, 2, 3, 1) * at.keep

    full = copy.copy(case)
    full.parameters = {**case.parameters, "weight": weight}
    dense = {name: (layout, convolve) for name, (layout, _) in case.spec.dense.items()}
    full.spec = replace(case.spec, name="full_channel_conv", dense=dense)
    return full


def spconv_full_channel(case: OpCase) -> EngineVariant:
    """``SubMConv2d`` of a :func:`full_channel_case`: another operation, C times the products of ours.

    Timed: the layer, on a ``SparseConvTensor`` that carries the index pairs of an earlier call. The backward of spconv
    2.3 asks PyTorch for a CUDA stream, which a build without CUDA answers with an error. Where there is no CUDA its
    ``ops.get_current_stream`` is replaced, for the whole process, by a function that returns 0; the CPU code uses none.
    """
    import spconv.pytorch as spconv
    from spconv.pytorch import ops

    if not torch.cuda.is_available():
        ops.get_current_stream = lambda: 0
    weight = case.parameters["weight"].clone(memory_format=torch.channels_last)
    c, k = weight.shape[0], weight.shape[-1]
    conv = spconv.SubMConv2d(c, c, k, padding=k // 2, bias=True, indice_key="sites")
    # Indices that are not contiguous are read wrongly, without an error.
    sites = site_coordinates(case.mask, case.side).int().contiguous()
    tensor = spconv.SparseConvTensor(torch.zeros(len(sites), c), sites, list(case.x.shape[1:3]), len(case.mask))
    with torch.no_grad():
        paired = conv(tensor)
    _release(conv, weight=(c, k, k, c), bias=(c,))

    def convolve(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        conv.weight, conv.bias = weight.permute(0, 2, 3, 1), bias
        return conv(paired.replace_feature(rows)).features

    return _bind(case, weight, paired.indices, convolve, comparable=False)
