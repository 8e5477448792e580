"""Stand-ins for three sparse convolution libraries, true to the interface each of them documents.

They compute with plain PyTorch, but in the coordinate order, tap order and weight shape of the library, and two of them
shuffle the rows. Parameters start as NaN: whoever forgets to set one sees it. :class:`Fault` makes one wrong.
"""

from types import ModuleType

import torch
from torch import nn

K, R = 7, 3


def convolve(sites, rows, product):
    """Sum over taps of ``product(d0, d1, rows)`` at the sites [R, 3] (batch, axis 0, axis 1) where the tap falls."""
    total = 0
    for d0 in range(-R, R + 1):
        for d1 in range(-R, R + 1):
            tap = sites + torch.tensor([0, d0, d1], dtype=sites.dtype)
            hits = (tap[:, None] == sites[None]).all(dim=2).to(rows.dtype)
            total = total + hits @ product(d0, d1, rows)
    return total


class Fault:
    """What a stand-in does wrong: its taps, rows, numbers or sites, or it raises; ``built`` counts its kernel maps."""

    def __init__(self, kind=None):
        self.kind, self.built = kind, 0

    def sites(self, sites):
        """The sites it tells of."""
        wrong = {"rows": sites.roll(1, 0), "sites": sites[:-1]}
        return wrong.get(self.kind, sites)

    def tap(self, index):
        return K * K - 1 - index if self.kind == "taps" else index

    def output(self, rows):
        if self.kind == "raises":
            raise RuntimeError("this engine\nis broken")
        # 1e-4 is far above rounding of a few hundred float32 terms, and small to the eye.
        return rows * (1 + 1e-4) if self.kind == "numbers" else rows


def shuffled(count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(3))


def fake_minkowski(fault):
    me = ModuleType("MinkowskiEngine")
    me.__version__ = "0.5.4"

    class Manager:
        def __init__(self, sites):
            self.maps = {"stride 1": sites}
            fault.built += 1

        def get_coordinates(self, key):
            return fault.sites(self.maps[key])

    class SparseTensor:
        def __init__(self, features, coordinates=None, coordinate_map_key=None, coordinate_manager=None):
            self.F, self.coordinate_map_key, self.coordinate_manager = features, coordinate_map_key, coordinate_manager
            if coordinates is not None:
                assert coordinates.dtype == torch.int32
                order = shuffled(len(coordinates))
                self.F, self.coordinate_map_key = features[order], "stride 1"
                self.coordinate_manager = Manager(coordinates[order])

        @property
        def C(self):
            return self.coordinate_manager.get_coordinates(self.coordinate_map_key)

    class MinkowskiChannelwiseConvolution(nn.Module):
        def __init__(self, in_channels, kernel_size=-1, bias=False, dimension=-1):
            super().__init__()
            self.kernel = nn.Parameter(torch.full((kernel_size**dimension, in_channels), torch.nan))
            self.bias = nn.Parameter(torch.full((1, in_channels), torch.nan)) if bias else None

        def forward(self, x):
            def product(d0, d1, rows):  # the first axis runs fastest
                return rows * self.kernel[fault.tap((d1 + R) * K + d0 + R)]

            assert self.kernel.is_contiguous()
            key, manager = x.coordinate_map_key, x.coordinate_manager
            stride = int(key.split()[1])
            sites = manager.maps[key] // torch.tensor([1, stride, stride], dtype=torch.int32)
            out = convolve(sites, x.F, product) + self.bias
            return SparseTensor(fault.output(out), coordinate_map_key=key, coordinate_manager=manager)

    class MinkowskiConvolution(nn.Module):
        """Kernel 2 and stride 2; coordinates keep counting the sites of the first map."""

        def __init__(self, in_channels, out_channels, kernel_size=-1, stride=1, bias=False, dimension=None):
            super().__init__()
            assert (kernel_size, stride, bias, dimension) == (2, 2, True, 2)
            self.kernel = nn.Parameter(torch.full((4, in_channels, out_channels), torch.nan))
            self.bias = nn.Parameter(torch.full((1, out_channels), torch.nan))

        def forward(self, x):
            assert self.kernel.is_contiguous()
            manager, stride = x.coordinate_manager, int(x.coordinate_map_key.split()[1])
            fine = manager.maps[x.coordinate_map_key] // torch.tensor([1, stride, stride], dtype=torch.int32)
            coarse, place = torch.unique(fine // torch.tensor([1, 2, 2]), dim=0, return_inverse=True)
            order = shuffled(len(coarse))
            key = f"stride {2 * stride}"
            manager.maps[key] = (coarse[order] * torch.tensor([1, 2 * stride, 2 * stride])).int()
            tap = fine[:, 1] % 2 + 2 * (fine[:, 2] % 2)  # the first axis runs fastest
            out = torch.zeros(len(coarse), self.kernel.shape[2], dtype=x.F.dtype)
            for index in range(4):
                rows = (tap == index).nonzero()[:, 0]
                out = out.index_add(0, place[rows], x.F[rows] @ self.kernel[index])
            out = fault.output(out[order] + self.bias)
            return SparseTensor(out, coordinate_map_key=key, coordinate_manager=manager)

    me.MinkowskiConvolution = MinkowskiConvolution
    me.SparseTensor, me.MinkowskiChannelwiseConvolution = SparseTensor, MinkowskiChannelwiseConvolution
    return {"MinkowskiEngine": me}


def fake_sparse_conv_net(fault):
    scn = ModuleType("sparseconvnet")

    class SparseConvNetTensor:
        def __init__(self, features=None, metadata=None, spatial_size=None):
            self.features, self.metadata, self.spatial_size = features, metadata, spatial_size

        def get_spatial_locations(self):
            return fault.sites(self.metadata)

    class InputLayer(nn.Module):
        def __init__(self, dimension, spatial_size, mode=3):
            super().__init__()
            assert (dimension, spatial_size.dtype, mode) == (2, torch.int64, 0)
            self.spatial_size = spatial_size

        def forward(self, x):
            sites, features, batch_size = x
            assert (sites < torch.cat([self.spatial_size, torch.tensor([batch_size])])).all()
            order = shuffled(len(sites))
            fault.built += 1
            return SparseConvNetTensor(features[order], sites[order], self.spatial_size)

    class SubmanifoldConvolution(nn.Module):
        def __init__(self, dimension, nIn, nOut, filter_size, bias, groups=1):
            super().__init__()
            shape = (filter_size**dimension, groups, nIn // groups, nOut // groups)
            self.weight = nn.Parameter(torch.full(shape, torch.nan))
            self.bias = nn.Parameter(torch.full((nOut,), torch.nan))

        def forward(self, x):
            def product(d0, d1, rows):  # the last axis runs fastest
                return rows * self.weight[fault.tap((d0 + R) * K + d1 + R)].flatten()

            assert self.weight.is_contiguous()
            out = convolve(x.metadata[:, [2, 0, 1]], x.features, product) + self.bias  # batch index last
            return SparseConvNetTensor(fault.output(out), x.metadata, x.spatial_size)

    scn.SparseConvNetTensor, scn.InputLayer = SparseConvNetTensor, InputLayer
    scn.SubmanifoldConvolution = SubmanifoldConvolution
    return {"sparseconvnet": scn}


def fake_spconv(fault):
    package, spconv, ops = (ModuleType(f"spconv{end}") for end in ("", ".pytorch", ".pytorch.ops"))
    package.__version__, package.pytorch, spconv.ops = "2.3.8", spconv, ops

    def get_current_stream():
        if not torch.cuda.is_available():
            raise AssertionError("Torch not compiled with CUDA enabled")

    class SparseConvTensor:
        def __init__(self, features, indices, spatial_shape, batch_size, indice_dict=None):
            assert indices.dtype == torch.int32 and indices.is_contiguous()
            assert (indices < torch.tensor([batch_size, *spatial_shape])).all()
            self.features, self.shape = features, (spatial_shape, batch_size)
            self.indices, self.indice_dict = indices, indice_dict or {}

        def replace_feature(self, features):
            return SparseConvTensor(features, self.indices, *self.shape, self.indice_dict)

    class SubMConv2d(nn.Module):
        def __init__(self, in_channels, out_channels, kernel_size, padding=0, bias=True, indice_key=None):
            super().__init__()
            assert padding == kernel_size // 2 and indice_key is not None
            self.key = indice_key
            self.weight = nn.Parameter(torch.full((out_channels, kernel_size, kernel_size, in_channels), torch.nan))
            self.bias = nn.Parameter(torch.full((out_channels,), torch.nan))

        def forward(self, x):
            def product(d0, d1, rows):
                index = fault.tap((d0 + R) * K + d1 + R)
                return rows @ self.weight[:, index // K, index % K].t()

            assert self.weight.is_contiguous()
            fault.built += self.key not in x.indice_dict
            sites = x.indice_dict.get(self.key, x.indices)
            out = fault.output(convolve(sites, x.features, product) + self.bias)
            if out.requires_grad:
                out.register_hook(lambda grad: (ops.get_current_stream(), grad)[1])
            result = x.replace_feature(out)
            result.indices = fault.sites(x.indices)
            result.indice_dict = {**x.indice_dict, self.key: sites}
            return result

    ops.get_current_stream = get_current_stream
    spconv.SparseConvTensor, spconv.SubMConv2d = SparseConvTensor, SubMConv2d
    return {module.__name__: module for module in (package, spconv, ops)}


FAKES = {"SparseConvNet": fake_sparse_conv_net, "MinkowskiEngine": fake_minkowski, "spconv": fake_spconv}
