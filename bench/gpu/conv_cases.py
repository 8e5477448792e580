"""The depthwise convolution's kernels and their peers in cuDNN."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bytes_moved
from .cases import CONV_TARGETS, Case, StageShape
from .operators import Draw

KERNEL = 7
EPS = 1e-6


def _with_choice(choice: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call under ``CONVNEXTV2_KERNELS_CUDA_CONV``, which the kernels read at every launch."""
    name = "CONVNEXTV2_KERNELS_CUDA_CONV"

    def run() -> object:
        before = os.environ.get(name)
        os.environ[name] = choice
        try:
            return call()
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before

    return run


def packed_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    """The kernels on the packed patches of a stage."""

    def table(draw: Draw) -> Tensor:
        return draw.layout(shape.images, shape.grid).neighbour_slots(-(-(KERNEL // 2) // shape.side))

    size = (shape.slots, shape.side, shape.side, shape.width)
    return _own_cases(ops, "", shape.label, size, table, CONV_TARGETS.get(shape.side, {}), itemsize)


def _own_cases(
    ops,
    prefix: str,
    label: str,
    size: tuple[int, int, int, int],
    table: Callable[[Draw], Tensor | None],
    targets: dict[str, float],
    itemsize: int,
) -> list[Case]:
    """Forward, gradient of x with the residual's added, normalised forward, and gradient of the weight."""
    c, rows = size[3], size[0] * size[1] * size[2]

    def weight(draw: Draw) -> Tensor:
        return draw.parameters(c, 1, KERNEL, KERNEL)

    def forward(draw, sets):
        w, b, near = weight(draw), draw.parameters(c), table(draw)
        run = ops.depthwise_conv_forward.default
        return [lambda t=t: run(t, w, b, None, near, False) for t in draw.features(sets, *size)]

    def input_grad(draw, sets):
        w, near = weight(draw), table(draw)
        pairs = zip(draw.features(sets, *size), draw.features(sets, *size), strict=True)
        return [lambda g=g, r=r: ops.depthwise_conv_forward.default(g, w, None, r, near, True) for g, r in pairs]

    def normalize(draw, sets):
        w, b, near = weight(draw), draw.parameters(c), table(draw)
        run = ops.depthwise_conv_normalize.default
        return [lambda t=t: run(t, w, b, near, None, None, EPS) for t in draw.features(sets, *size)]

    def weight_grad(draw, sets):
        near = table(draw)
        pairs = zip(draw.features(sets, *size), draw.features(sets, *size), strict=True)
        return [lambda g=g, t=t: ops.depthwise_conv_backward_weight.default(g, t, near, KERNEL) for g, t in pairs]

    def on_tensor_cores(make):
        def with_choice(draw, sets):
            return [_with_choice("tensor", call) for call in make(draw, sets)]

        return with_choice

    plain, residual = (bytes_moved.conv_forward(rows, c, itemsize, residual) for residual in (False, True))
    target, target_dw = targets.get("forward"), targets.get("weight_grad")
    tensor = []
    if size[1] % 8 == 0 and size[2] % 8 == 0 and itemsize == 2:
        tensor = [
            Case(f"conv_forward tensor{prefix} {label}", plain, on_tensor_cores(forward)),
            Case(f"conv_dx_residual tensor{prefix} {label}", residual, on_tensor_cores(input_grad)),
            Case(
                f"conv_normalize tensor{prefix} {label}",
                bytes_moved.conv_normalize(rows, c, itemsize),
                on_tensor_cores(normalize),
            ),
        ]
    return [
        *tensor,
        Case(f"conv_forward{prefix} {label}", plain, forward, target),
        Case(f"conv_dx_residual{prefix} {label}", residual, input_grad, target),
        Case(f"conv_normalize{prefix} {label}", bytes_moved.conv_normalize(rows, c, itemsize), normalize),
        Case(f"conv_dw{prefix} {label}", bytes_moved.conv_weight_grad(rows, c, itemsize), weight_grad, target_dw),
    ]


def dense_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    """The same kernels on the dense map of a stage, and cuDNN's, in both memory formats."""
    side, c, rows = shape.grid * shape.side, shape.width, shape.all_rows
    label = f"{shape.model} n{shape.images} {side}x{side} c{c}"
    size = (shape.images, side, side, c)

    def x(draw: Draw, sets: int) -> Tensor:
        return draw.features(sets, *size)

    def peer(layout: str, what: str):
        def make(draw, sets):
            inputs = [t.permute(0, 3, 1, 2) for t in x(draw, sets)]
            grads = [t.permute(0, 3, 1, 2) for t in x(draw, sets)] if what != "forward" else inputs
            if layout == "nchw":
                inputs, grads = ([t.contiguous() for t in ts] for ts in (inputs, grads))
            format_ = torch.contiguous_format if layout == "nchw" else torch.channels_last
            w = draw.parameters(c, 1, KERNEL, KERNEL).to(draw.dtype).contiguous(memory_format=format_)
            if what == "forward":
                b = draw.parameters(c).to(draw.dtype)
                return [lambda t=t: F.conv2d(t, w, b, padding=KERNEL // 2, groups=c) for t in inputs]
            mask = [what == "dx", what == "dw", what == "dw"]
            pad = [KERNEL // 2] * 2
            backward = torch.ops.aten.convolution_backward.default

            def call(g, t):
                return lambda: backward(g, t, w, [c], [1, 1], pad, [1, 1], False, [0, 0], c, mask)

            return [call(g, t) for g, t in zip(grads, inputs, strict=True)]

        return make

    least = bytes_moved.conv_forward(rows, c, itemsize)
    cases = _own_cases(ops, " dense", label, size, lambda draw: None, {}, itemsize)
    for layout in ("channels_last", "nchw"):
        for what in ("forward", "dx", "dw"):
            cases.append(Case(f"torch conv {what} {layout} {label}", least, peer(layout, what), peer=True))
    return cases
