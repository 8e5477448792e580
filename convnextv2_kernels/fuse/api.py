"""Fusing a model and undoing it, in one walk over its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .. import backends
from ..nn import ConvNeXtV2Block
from ..schedule import SAVE_POLICIES
from . import checks
from .families import Family, family_of, v1_block
from .forward import FusedForward, install, installed, remove
from .report import FuseReport, Replaced, Skipped
from .trial import computes_otherwise


def fuse(model: nn.Module, strict: bool = True, save: str | None = None) -> FuseReport:
    """Give every ConvNeXt V2 block of a model the fused forward and backward, in place.

    Supports timm's ``ConvNeXtBlock`` with GRN, transformers' ``ConvNextV2Layer``, the official ``Block`` and this
    library's own (always fused). Parameters stay the same objects under the same names, classes do not change, and
    the results agree up to rounding, including the random draws of drop path. It can be called before or
    after the model is wrapped (DDP, FSDP2, ``torch.compile``), copied or moved. :func:`unfuse` undoes it.

    Args:
        model: any module; it may itself be a block.
        strict: whether a model without a single fused block is an error.
        save: the tensors that blocks save for backward, memory against time: "inputs", "normalized" or "hidden", see
            :func:`convnextv2_kernels.ops.convnextv2_block`; None for the default of the device. It also applies
            to blocks fused before; this library's own blocks always use the default.

    Returns:
        A report of what was replaced and what was skipped, with reasons.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: another ``save``; or ``strict``, and nothing could be fused.
    """
    _check_model(model)
    if save not in (None, *SAVE_POLICIES):
        raise ValueError(f"save must be one of {', '.join(SAVE_POLICIES)} or None, got {save!r}")
    plan, skipped, already = _sorted_blocks(model)
    for block, family in plan.values():
        install(block, FusedForward(block, family, save))
    replaced = [Replaced(name, family.title) for name, (_, family) in plan.items()]
    report = FuseReport(type(model).__name__, tuple(replaced), tuple(skipped), tuple(already), _backend(model))
    if strict and not replaced and not already:
        raise ValueError(
            f"model is a {type(model).__name__} in which no block can be fused: {report.found()} "
            "(strict=False accepts it)"
        )
    if save is not None:
        for module in model.modules():
            forward = installed(module)
            if forward is not None:
                forward.save = save
    return report


def unfuse(model: nn.Module) -> int:
    """Undo :func:`fuse`: every block runs the forward of its class again. Returns how many blocks were restored."""
    _check_model(model)
    blocks = [module for module in model.modules() if installed(module) is not None]
    for block in blocks:
        remove(block)
    return len(blocks)


@contextlib.contextmanager
def fused(model: nn.Module, strict: bool = True, save: str | None = None) -> Iterator[FuseReport]:
    """``with fused(model) as report:`` fuses inside the block only; blocks fused before stay fused."""
    _check_model(model)
    before = {forward: forward.save for module in model.modules() if (forward := installed(module)) is not None}
    report = fuse(model, strict, save)
    blocks = [model.get_submodule(entry.name) for entry in report.replaced]
    try:
        yield report
    finally:
        for forward, kept in before.items():
            forward.save = kept
        for block in blocks:
            if installed(block) is not None:
                remove(block)


def _sorted_blocks(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, Family]], list[Skipped], list[str]]:
    """The blocks to fuse, the blocks that cannot be, and the names of those that are."""
    plan: dict[str, tuple[nn.Module, Family]] = {}
    skipped: list[Skipped] = []
    already: list[str] = []
    for name, module in model.named_modules():
        forward = installed(module)
        if isinstance(module, ConvNeXtV2Block) and not module.grn.variant.fused:
            skipped.append(Skipped(name, f"its GRN variant '{module.grn.variant}' runs in plain PyTorch"))
            continue
        if isinstance(module, ConvNeXtV2Block) or forward is not None:
            reason = None if forward is None else forward.unfit()
            if reason is None:
                already.append(name)
            else:
                skipped.append(Skipped(name, f"fused before, but it has changed and runs unfused now: {reason}"))
            continue
        v1 = v1_block(module)
        if v1 is not None:
            skipped.append(Skipped(name, v1))
            continue
        family = family_of(module)
        if family is None:
            continue
        reason = checks.why_not(family, module)
        if reason is None and not family.classes:
            reason = computes_otherwise(module, family)
        if reason is None:
            plan[name] = module, family
        else:
            skipped.append(Skipped(name, reason))
    return plan, skipped, already


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _backend(model: nn.Module) -> str:
    """The backend for the model's current dtype and device."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return "none: the model has no parameters"
    device, dtype = parameter.device, parameter.dtype
    if device.type == "meta":
        return "decided when the model leaves the meta device"
    described = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    try:
        name = backends.select(parameter, "fuse")
    except RuntimeError as error:
        return f"nothing: {error}"
    if name != "reference":
        return f"{name} ({described})"
    others = backends.PREFERENCE.get(device.type, ()) if backends.forced() == "auto" else ()
    reasons = ((other, backends.unsupported_reason(other, device.type, dtype, device.index)) for other in others)
    why = "".join(f"; {other}: {reason}" for other, reason in reasons if reason is not None)
    return f"reference, plain PyTorch, not faster ({described}{why})"
