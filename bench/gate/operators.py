"""Every public op by itself, forward and backward, on a few patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import convnextv2_kernels as ck
from convnextv2_kernels import ops

from .trace import kept, measured

# True = hidden: 3x3 patches, of every image six visible.
MASK = (((0, 0, 1), (0, 0, 0), (1, 1, 0)), ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
SIDE = 4
WIDTH = 16
HIDDEN = 4 * WIDTH

Call = Callable[[dict[str, Tensor], ck.PatchLayout | None], Tensor]


def _mlp(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(p[name] for name in ("w1", "b1", "gamma", "beta", "w2", "b2"))


def _conv(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return p["weight"], p["bias"]


def _norm(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return p["ln_weight"], p["ln_bias"]


# Input (a name of `inputs`) and call of each op.
CALLS: dict[str, tuple[str, Call]] = {
    "convnextv2_block": ("x", lambda p, at: ops.convnextv2_block(p["x"], *_conv(p), *_norm(p), *_mlp(p), at)),
    "depthwise_conv_layer_norm": ("x", lambda p, at: ops.depthwise_conv_layer_norm(p["x"], *_conv(p), *_norm(p), at)),
    "downsample": ("x", lambda p, at: ops.downsample(p["x"], *_norm(p), p["down_weight"], p["down_bias"])),
    "gather_patches": ("map", lambda p, at: ops.gather_patches(p["x"], at)),
    "gathered_pointwise_mlp": ("map", lambda p, at: ops.gathered_pointwise_mlp(p["x"], *_mlp(p), at)),
    "gelu_grn": ("hidden", lambda p, at: ops.gelu_grn(p["x"], p["gamma"], p["beta"], at)),
    "global_response_norm": ("hidden", lambda p, at: ops.global_response_norm(p["x"], p["gamma"], p["beta"], at)),
    "layer_norm": ("x", lambda p, at: ops.layer_norm(p["x"], *_norm(p))),
    "layer_norm_grn": ("x", lambda p, at: ops.layer_norm_grn(p["x"], *_norm(p), p["ln_bias"] + 1, p["ln_weight"], at)),
    "linear": ("x", lambda p, at: ops.linear(p["x"], p["w1"], p["b1"])),
    "patch_embed": ("images", lambda p, at: ops.patch_embed(p["x"], p["stem"], p["bias"], at)),
    "patch_embed_layer_norm": (
        "images",
        lambda p, at: ops.patch_embed_layer_norm(p["x"], p["stem"], p["bias"], *_norm(p), at),
    ),
    "pointwise_mlp": ("x", lambda p, at: ops.pointwise_mlp(p["x"], *_mlp(p), at)),
    "scatter_patches": ("x", lambda p, at: ops.scatter_patches(p["x"], at)),
    "submanifold_depthwise_conv2d": ("x", lambda p, at: ops.submanifold_depthwise_conv2d(p["x"], *_conv(p), at)),
}
# Ops that take dense maps too, [N, H, W, C] without a layout.
DENSE = ("convnextv2_block", "depthwise_conv_layer_norm", "gelu_grn", "pointwise_mlp", "submanifold_depthwise_conv2d")


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _parameters(generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {
        "weight": (WIDTH, 1, 7, 7),
        "bias": (WIDTH,),
        "ln_weight": (WIDTH,),
        "ln_bias": (WIDTH,),
        "w1": (HIDDEN, WIDTH),
        "b1": (HIDDEN,),
        "gamma": (HIDDEN,),
        "beta": (HIDDEN,),
        "w2": (WIDTH, HIDDEN),
        "b2": (WIDTH,),
        "down_weight": (2 * WIDTH, WIDTH, 2, 2),
        "down_bias": (2 * WIDTH,),
        "stem": (WIDTH, 3, 4, 4),
    }
    return {name: 0.2 * _draw(generator, *shape) for name, shape in shapes.items()}


def measure_op(name: str, dense: bool = False) -> dict[str, dict[str, int]]:
    """One op on packed patches, or on dense maps: the cpu backend in full, of the reference the bytes saved."""
    generator = torch.Generator().manual_seed(0)
    layout = ck.PatchLayout.from_mask(torch.tensor(MASK).bool())
    images, extent = layout.num_images, 3 * SIDE
    inputs = {
        "x": (layout.num_patches, SIDE, SIDE, WIDTH),
        "hidden": (layout.num_patches, SIDE, SIDE, HIDDEN),
        "map": (images, extent, extent, WIDTH),
        "images": (images, 3, 4 * extent, 4 * extent),
    }
    if dense:
        inputs |= {"x": inputs["map"], "hidden": (images, extent, extent, HIDDEN)}
    kind, call = CALLS[name]
    leaves = {"x": _draw(generator, *inputs[kind]), **_parameters(generator)}
    leaves = {key: value.requires_grad_() for key, value in leaves.items()}
    at = None if dense else layout
    with torch.no_grad():
        cotangent = _draw(generator, *call(leaves, at).shape)
    alive = [*leaves.values(), cotangent, layout.slot_of_patch, layout.patch_of_slot, layout.image_offsets]

    def forward() -> Tensor:
        return (call(leaves, at) * cotangent).sum()

    label = f"{name} dense" if dense else name
    results = {}
    with ck.use_backend("cpu"):
        results[f"{label} cpu"] = measured(forward, alive)
    with ck.use_backend("reference"):
        results[f"{label} reference"] = kept(forward, alive)
    return results


def measure(log: Callable[[str], None] = lambda text: None) -> dict[str, dict[str, int]]:
    """Every op of the library."""
    log(f"{len(CALLS)} ops")
    results = {}
    for name in CALLS:
        results.update(measure_op(name))
    for name in DENSE:
        results.update(measure_op(name, dense=True))
    return results
