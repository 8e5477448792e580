"""Where a number stopped being finite: the first tensor of a step that holds a NaN or an infinity."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def first_in_forward(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """Run ``forward`` again and name the first tensor that is not finite: a parameter, or the output of a module.

    Modules report in the order in which they finish, so the innermost culprit comes first. Returns None where this run
    is finite throughout.
    """
    found: list[str] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple, output: object) -> None:
        if found:
            return
        for tensor in _tensors(output):
            if fault := describe(tensor):
                inputs = [t for t in _tensors(args) if t.is_floating_point() and t.numel()]
                largest = max((float(t.detach().abs().max()) for t in inputs), default=0.0)
                found.append(
                    f"the output of {names[module]} ({type(module).__name__}) {list(tensor.shape)}: {fault}, while its "
                    f"inputs reach {largest:.3g}"
                )
                return

    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if fault := describe(local):
            found.append(f"parameter {name} {list(parameter.shape)}: {fault}")
            break
    hooks = [module.register_forward_hook(look) for module in names]
    try:
        with torch.no_grad():
            loss = forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not found and (fault := describe(loss)):
        found.append(f"the loss itself: {fault}")
    return found[0] if found else None


def first_gradient(model: nn.Module) -> str | None:
    """Name the gradient that backward makes first among those that are not finite: that of the last such parameter."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is None:
            continue
        grad = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        if fault := describe(grad):
            return f"the gradient of {name} {list(parameter.shape)}: {fault}"
    return None


def describe(tensor: Tensor) -> str | None:
    """``3 NaN and 1 infinite of 640 values``, or None where all are finite."""
    if not tensor.is_floating_point() or torch.isfinite(tensor).all():
        return None
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    parts = [f"{count} {word}" for count, word in ((nan, "NaN"), (inf, "infinite")) if count]
    return f"{' and '.join(parts)} of {tensor.numel()} values"


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
