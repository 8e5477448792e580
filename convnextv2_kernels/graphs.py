"""A whole training step in one CUDA graph, which saves the host's launch overhead: most of a small model's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_WARM_UP = 3  # steps before the capture: cuBLAS workspaces, autotuning, optimizer state


class GraphedStep:
    """The result of :func:`make_graphed_step`; call it with a batch like the sample."""

    def __init__(self, graph, images: Tensor, loss: Tensor, gradients: list[tuple[nn.Parameter, Tensor]]):
        self._graph, self._images, self._loss, self._gradients = graph, images, loss, gradients

    def __call__(self, images: Tensor) -> Tensor:
        """One step on ``images``, of the sample's shape and dtype (any device); the loss, on the device, not synced.

        Afterwards every parameter's ``grad`` holds this step's gradient; gradients do not accumulate over calls.
        """
        if images.shape != self._images.shape or images.dtype != self._images.dtype:
            raise ValueError(
                f"images is {images.dtype} of shape {list(images.shape)}, but the step was captured for "
                f"{self._images.dtype} of shape {list(self._images.shape)}"
            )
        self._images.copy_(images, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient  # zero_grad(set_to_none=True) may have dropped it
        return self._loss.detach().clone()


def make_graphed_step(
    model: nn.Module,
    images: Tensor,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    autocast: torch.dtype | None = None,
) -> GraphedStep:
    """Captures forward, backward and, if given, the optimizer's step of ``model`` in a CUDA graph.

    FCMAE draws a new mask in every replay: the default generator is part of the graph, and masks with the same number
    of visible patches in every image need no synchronisation (:meth:`PatchLayout.from_kept`). No loss of an earlier
    step of the model may be alive, because its autograd graph would tie the capture to another stream.

    Args:
        model: on a CUDA device, in training mode. images: a sample batch on that device, ``[N, C, H, W]``.
        loss: ``loss(model, images)`` -> scalar; by default the first output of ``model(images)``, FCMAE's loss.
        optimizer: Adam or AdamW with ``capturable=True``, with ``lr`` as a tensor on the device if it changes between
            steps; None leaves the update to the caller. Parameters and state are unchanged when this returns,
            gradients are dropped.
        autocast: dtype of ``torch.autocast``, or None.

    Raises:
        ValueError: no CUDA device, an optimizer that cannot be captured, or an FCMAE that without a mask would hide all
            or none of the patches of the sample.
    """
    if not isinstance(images, Tensor) or images.device.type != "cuda":
        where = images.device if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor on a CUDA device (a CUDA graph is captured), got {where}")
    _check_optimizer(optimizer)
    static = images.clone()

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            value = model(static)[0] if loss is None else loss(model, static)
        value.backward()
        if optimizer is not None:
            optimizer.step()
        return value

    parameters = [p for p in model.parameters() if p.requires_grad]
    restore = _snapshot(model, optimizer)
    # One stream for warm-up and capture: autograd remembers the stream a gradient was first accumulated on, and the
    # default capture stream belongs to the device that was current when a process captured its first graph.
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.device(images.device), torch.cuda.stream(stream):
        try:
            for _ in range(_WARM_UP):
                model.zero_grad(set_to_none=True)
                step()
        finally:
            model.zero_grad(set_to_none=True)
            restore()
    torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(images.device), torch.cuda.graph(graph, stream=stream):
        value = step()
    gradients = [(p, p.grad) for p in parameters if p.grad is not None]
    return GraphedStep(graph, static, value, gradients)


def _check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    # the warm-up's state is reset to zero, its initial value
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise ValueError(f"optimizer must be Adam or AdamW to be captured, got {type(optimizer).__name__}")
    if not all(group.get("capturable") for group in optimizer.param_groups):
        raise ValueError("optimizer must be made with capturable=True to be captured in a CUDA graph")


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
    """Returns a function that restores parameters, buffers and optimizer state, in place."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [t.detach().clone() for t in tensors]
    states = {} if optimizer is None else _states(optimizer)
    kept = {key: t.clone() for key, t in states.items()}

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
        if optimizer is not None:
            for key, tensor in _states(optimizer).items():
                tensor.copy_(kept[key]) if key in kept else tensor.zero_()

    return restore


def _states(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    return {
        (id(parameter), name): value
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
