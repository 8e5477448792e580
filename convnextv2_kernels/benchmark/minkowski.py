"""MinkowskiEngine, the sparse engine of the paper's Figure 6, as a variant of the training step where it is installed.

The encoder is built of the engine's layers as the official code builds it: a dense stem on all pixels, then a sparse
tensor of the visible sites, channelwise 7x7 convolutions and strided 2x2 convolutions; normalisation, pointwise layers
and GELU on the rows of features. The decoder and the loss are those of the masked dense baseline. Two things differ
from the official encoder: GRN is per image, so that the step computes the numbers of all other variants, and weights
lie in memory in the engine's order, so that none is copied. Coordinates and kernel maps are made in every step, as the
masks of a training change. Written from the interface of version 0.5.4.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baseline import EPS, Baseline, MaskedDenseFCMAE
from .correctness import CorrectnessError, check_fcmae
from .machine import free_memory
from .variants import Batch, Variant

PACKAGE = "MinkowskiEngine"
# Of the paper: Appendix C, Figure 6.
QUOTED = (
    "the paper's figures for it, a mean of 1.3 times the throughput of masked dense convolution and half the peak "
    "memory (version 0.5.4, PyTorch 1.8.0, RTX A6000, batch 64), are quoted, not measured"
)
KERNEL_SIZE = 7
_AS_WRITTEN = Baseline("channels_last", "linear")  # of the stem, the decoder and the loss


def installed() -> bool:
    """Whether the package is there; it may still fail to import."""
    return importlib.util.find_spec(PACKAGE) is not None


def described() -> dict:
    """JSON-ready: name and version, or that its figures are quoted."""
    if not installed():
        return {"name": PACKAGE, "version": None, "note": f"not installed; {QUOTED}"}
    try:
        version = getattr(_engine(), "__version__", "of unknown version")
    except Exception as error:  # a build for another PyTorch, a missing library
        return {"name": PACKAGE, "version": None, "note": f"does not import ({_first_line(error)}); {QUOTED}"}
    return {"name": PACKAGE, "version": version, "note": None}


def unchecked(sparse: Variant) -> Variant:
    """The step by the engine with the weights of ours."""
    model = MinkowskiFCMAE.from_state_dict(sparse.model.state_dict(), baseline=_AS_WRITTEN)
    return Variant(PACKAGE, model, model, engine=PACKAGE)


def make_variant(sparse: Variant, batch: Batch, dense: Variant) -> tuple[Variant | None, str | None]:
    """:func:`unchecked`, checked as ours is; or None and why there is none.

    ``dense`` tells what plain PyTorch's rounding error is.
    """
    if batch.dtype not in (torch.float32, torch.float64):
        return None, f"it computes in float32 and float64, and the step in {str(batch.dtype).removeprefix('torch.')}"
    variant, reason = None, None
    try:
        variant = unchecked(sparse)
        check_fcmae(variant, [dense], batch)
    except CorrectnessError as error:
        variant, reason = None, f"wrong: {error}"
    except Exception as error:  # of the engine, in classes that differ between its versions
        variant, reason = None, f"{type(error).__name__}: {_first_line(error)}"
    if variant is None:  # not in the handler, where the error's traceback keeps the activations alive
        free_memory(batch.device)
    return variant, reason


class MinkowskiFCMAE(MaskedDenseFCMAE):
    """FCMAE with the encoder in MinkowskiEngine's layers; called as :class:`MaskedDenseFCMAE` is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine = _engine()
        widths = [stage[0].dwconv.in_channels for stage in self.encoder.stages]
        # not children: their kernels are views of this model's parameters
        self._layers = {
            "depthwise": [_depthwise(engine, width) for width in widths],
            "down": [
                _released(engine.MinkowskiConvolution(narrow, wide, kernel_size=2, stride=2, bias=True, dimension=2))
                for narrow, wide in itertools.pairwise(widths)
            ],
        }

    @classmethod
    def from_state_dict(cls, state, norm_pix_loss: bool = True, baseline: Baseline | None = None) -> MinkowskiFCMAE:
        """See :meth:`MaskedDenseFCMAE.from_state_dict`; convolutions get memory of their own, in the engine's order."""
        model = super().from_state_dict(state, norm_pix_loss, baseline)
        convolutions = [block.dwconv for stage in model.encoder.stages for block in stage]
        convolutions += [down[1] for down in model.encoder.downsample_layers[1:]]
        for convolution in convolutions:
            weight = convolution.weight.detach()
            convolution.weight = nn.Parameter(weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))
        return model

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        engine = _engine()
        stem = self.encoder.downsample_layers[0](images.contiguous(memory_format=self.memory_format))  # NHWC
        sites = visible_sites(mask, stem.shape[1] // mask.shape[1])
        rows = stem[sites[:, 0], sites[:, 2], sites[:, 1]]
        x = engine.SparseTensor(rows, coordinates=sites.int())
        for index, stage in enumerate(self.encoder.stages):
            if index:
                x = self._downsampled(x, index)
            owner = x.C[:, 0].long(), len(images)
            for block in stage:
                x = self._block(x, block, self._layers["depthwise"][index], owner)
        # the last map has one site a patch, whose coordinates count the sites of the first
        stride = stem.shape[1] // mask.shape[1]
        image, column, row = x.C.long().unbind(1)
        dense = rows.new_zeros(len(images), mask.shape[1], mask.shape[2], x.F.shape[1])
        dense = dense.index_put((image, row // stride, column // stride), x.F)
        return dense.permute(0, 3, 1, 2)

    def _downsampled(self, x: Any, index: int) -> Any:
        norm, convolution = self.encoder.downsample_layers[index]
        layer = self._layers["down"][index - 1]
        weight = convolution.weight  # [2C, C, 2, 2] -> [4, C, 2C], a view
        layer.kernel, layer.bias = weight.permute(2, 3, 1, 0).flatten(0, 1), convolution.bias[None]
        return layer(_like(x, _norm(x.F, norm)))

    def _block(self, x: Any, block: nn.Module, layer: Any, owner: tuple[Tensor, int]) -> Any:
        weight = block.dwconv.weight  # [C, 1, 7, 7] -> [49, C], a view
        layer.kernel, layer.bias = weight.permute(2, 3, 1, 0).flatten(0, 2), block.dwconv.bias[None]
        y = _norm(layer(x).F, block.norm)
        h = F.gelu(F.linear(y, block.pwconv1.weight, block.pwconv1.bias))
        h = _grn(h, *owner, block.grn)
        return _like(x, x.F + F.linear(h, block.pwconv2.weight, block.pwconv2.bias))


def visible_sites(mask: Tensor, side: int) -> Tensor:
    """(image, column, row) of every visible site, [R, 3] int64; the engine's taps then run row by row.

    Args:
        mask: [N, Gh, Gw] bool, True = hidden. side: sites along one side of a patch.
    """
    visible = (~mask).repeat_interleave(side, 1).repeat_interleave(side, 2)
    return visible.nonzero()[:, [0, 2, 1]]


def _grn(h: Tensor, image: Tensor, images: int, grn: nn.Module) -> Tensor:
    """GRN of every image by itself; ``image [R]`` is the one that each row is of."""
    squares = h.new_zeros(images, h.shape[1]).index_add(0, image, h * h)
    # the root has no slope at zero
    norm = squares.clamp_min(torch.finfo(h.dtype).tiny).sqrt()
    scale = 1 + grn.gamma.flatten() * (norm / (norm.mean(1, keepdim=True) + EPS))
    return h * scale[image] + grn.beta.flatten()


def _norm(rows: Tensor, norm: nn.Module) -> Tensor:
    return F.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, EPS)


def _like(x: Any, rows: Tensor) -> Any:
    """A sparse tensor of other features at the same sites."""
    return _engine().SparseTensor(
        rows, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
    )


def _depthwise(engine: ModuleType, width: int) -> Any:
    """The official fork has a layer of its own, for GPUs only."""
    kind = engine.MinkowskiChannelwiseConvolution
    if torch.cuda.is_available():
        kind = getattr(engine, "MinkowskiDepthwiseConvolution", kind)
    return _released(kind(width, kernel_size=KERNEL_SIZE, bias=True, dimension=2))


def _released(layer: nn.Module) -> nn.Module:
    """A layer without its parameters, in whose place views of ours can be set."""
    del layer.kernel, layer.bias
    return layer


def _engine() -> ModuleType:
    return importlib.import_module(PACKAGE)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
