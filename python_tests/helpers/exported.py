"""Programs of a model in other forms, run on several inputs."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ONNX_TOLERANCE = 1e-5  # of the largest value: float32 sums in other orders, through a dozen layers


def flat(output) -> list[Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    return [t for t in (output.values() if isinstance(output, dict) else output) if isinstance(t, Tensor)]


@torch.no_grad()
def onnx_session(
    model: nn.Module, arguments: tuple[Tensor, ...], dynamo: bool, dynamic: bool = True, **options
) -> onnxruntime.InferenceSession:
    """The model in onnxruntime, by either exporter, with a batch of any size if ``dynamic``; ``options`` go to it."""
    names = [f"input{i}" for i in range(len(arguments))]
    if dynamic and dynamo:
        options["dynamic_shapes"] = tuple({0: "batch"} for _ in arguments)
    elif dynamic:
        options["dynamic_axes"] = {name: {0: "batch"} for name in names}
    file = io.BytesIO()
    torch.onnx.export(model, arguments, file, input_names=names, dynamo=dynamo, verbose=False, **options)
    return onnxruntime.InferenceSession(file.getvalue())


@torch.no_grad()
def assert_runs_as(
    model: nn.Module, session: onnxruntime.InferenceSession, inputs: Sequence[tuple[Tensor, ...]]
) -> None:
    """onnxruntime gives the model's outputs for each of the inputs."""
    for arguments in inputs:
        feed = {node.name: t.numpy() for node, t in zip(session.get_inputs(), arguments, strict=True)}
        for got, expected in zip(session.run(None, feed), flat(model(*arguments)), strict=True):
            largest = float(expected.abs().max()) if expected.numel() else 1.0
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=ONNX_TOLERANCE * max(1.0, largest))
