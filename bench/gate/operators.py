"""Every public op by itself, forward and backward, on a few patches; calls from the tests' catalogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conformance.samples import SPECS, Sample, make_sample
from torch import Tensor

import convnextv2_kernels as ck

from .trace import kept, measured

LAYOUT, IMAGES, GRID = "six_of_nine", 2, 3
SIDE = 4
WIDTH = 16
OPS = tuple(sorted(SPECS))
# Ops that take dense maps too, [N, H, W, C] without a layout.
DENSE = ("convnextv2_block", "depthwise_conv_layer_norm", "gelu_grn", "pointwise_mlp", "submanifold_depthwise_conv2d")
# Values of a sample's axes, where it has them; the rest as in a model.
AXES = {"c": WIDTH, "k": 7, "hidden": 4 * WIDTH, "out_c": WIDTH, "in_chans": 3}
AXES |= {"residual": False, "drop": False, "fill": False}
BY_OP = {
    "gelu_grn": {"c": 4 * WIDTH},
    "global_response_norm": {"c": 4 * WIDTH},
    "linear": {"out_c": 4 * WIDTH},
    "downsample": {"out_c": 2 * WIDTH},
}


def sample_of(op: str, dense: bool = False) -> Sample:
    """A call of an op in float32 on packed patches, or on dense maps of the same extent; leaves require
    grad."""
    axes = {name: value for name, value in {**AXES, **BY_OP.get(op, {})}.items() if name in SPECS[op].small}
    sample = make_sample(op, at=(LAYOUT, SIDE), **axes)
    tensors, constants = dict(sample.tensors), dict(sample.constants)
    for name in ("gamma", "beta"):
        if name in tensors:
            tensors[name] = tensors[name].flatten()
    if dense:
        extent = GRID * SIDE
        tensors["x"] = torch.randn(IMAGES, extent, extent, tensors["x"].shape[-1], dtype=torch.float64)
        constants["layout"] = None
    return Sample(op, tensors, constants).cast(torch.float32)


def measure_op(op: str, dense: bool = False) -> dict[str, dict[str, int]]:
    """One op on packed patches, or on dense maps: the cpu backend in full, of the reference the bytes saved."""
    torch.manual_seed(0)
    sample = sample_of(op, dense)
    with torch.no_grad():
        cotangent = torch.randn(sample().shape)
    alive = [tensor for tensor in (*sample.tensors.values(), cotangent) if tensor is not None]
    layout = sample.constants.get("layout")
    if layout is not None:
        alive += [layout.slot_of_patch, layout.patch_of_slot, layout.image_offsets]

    def forward() -> Tensor:
        return (sample() * cotangent).sum()

    label = f"{op} dense" if dense else op
    results = {}
    with ck.use_backend("cpu"):
        results[f"{label} cpu"] = measured(forward, alive)
    with ck.use_backend("reference"):
        results[f"{label} reference"] = kept(forward, alive)
    return results


def measure(log: Callable[[str], None] = lambda text: None) -> dict[str, dict[str, int]]:
    """Every op of the library."""
    log(f"{len(OPS)} ops")
    results = {}
    for op in OPS:
        results.update(measure_op(op))
    for op in DENSE:
        results.update(measure_op(op, dense=True))
    return results
