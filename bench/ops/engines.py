"""Sparse convolution engines of other projects as optional variants of the op benchmark, on a CPU in float32.

Nothing here is needed: an engine that is not installed, fails to import, raises or computes something else is left out,
with the reason. Two engines compute our depthwise convolution; spconv has no groups, so its variant is another
operation, marked by ``comparable`` and never to be put in a ratio.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from convnextv2_kernels.benchmark.correctness import CorrectnessError, compare, require, rounding_floor

from .engine_adapters import EngineVariant, full_channel_case, minkowski_engine, sparse_conv_net, spconv_full_channel
from .measure import OpCase


@dataclass(frozen=True)
class Engine:
    """An engine: its name, the module to import, what its variant is called, and how to build it.

    Attributes:
        case: what the variant is built for and judged by, of the case that is benchmarked.
    """

    name: str
    module: str
    operation: str
    build: Callable[[OpCase], EngineVariant]
    case: Callable[[OpCase], OpCase] = lambda case: case

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def load(self) -> ModuleType:
        """The package, imported with the module that is used."""
        package = importlib.import_module(self.package)
        importlib.import_module(self.module)
        return package

    @property
    def label(self) -> str:
        """Name, version where the package tells it, and operation; imports the package."""
        version = getattr(self.load(), "__version__", "")
        return " ".join(part for part in (self.name, version, self.operation) if part)


ENGINES = (
    Engine("SparseConvNet", "sparseconvnet", "groups=C", sparse_conv_net),
    Engine("MinkowskiEngine", "MinkowskiEngine", "channelwise", minkowski_engine),
    Engine("spconv", "spconv.pytorch", "dense-channel (other operation)", spconv_full_channel, full_channel_case),
)
BY_NAME = {engine.name: engine for engine in ENGINES}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def available() -> dict[str, str | None]:
    """For every engine, by name: None when it can be imported, or one sentence why it cannot."""
    reasons: dict[str, str | None] = {}
    for engine in ENGINES:
        try:
            engine.load()
            reasons[engine.name] = None
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == engine.package
            failure = f"import of {engine.module} fails with {_one_line(error)}"
            reasons[engine.name] = f"{engine.package} is not installed" if missing else failure
    return reasons


def engine_variants(case: OpCase) -> tuple[dict[str, EngineVariant], dict[str, str]]:
    """Arms of the engines that compute a depthwise case right, by label, and why the others are left out, by name.

    Each variant has passed the check of our own op, on this very case, with its maps already built; the
    comparison is with dense PyTorch of the operation the variant computes. Both are empty unless the case is a
    depthwise convolution in float32 on a CPU. Nothing an engine raises gets out of here.
    """
    variants: dict[str, EngineVariant] = {}
    reasons: dict[str, str] = {}
    if case.spec.name != "depthwise_conv" or case.dtype != torch.float32 or case.x.device.type != "cpu":
        return variants, reasons
    if case.mask.all():
        return variants, {engine.name: "the case has no visible site" for engine in ENGINES}
    reference: dict[str, list[dict[str, Tensor]]] = {}
    for name, reason in available().items():
        if reason is not None:
            reasons[name] = reason
            continue
        engine = BY_NAME[name]
        judged = engine.case(case)
        try:
            variant = engine.build(judged)
            results = judged._results(variant, packed=True)
        except Exception as error:
            reasons[name] = _one_line(error)
            continue
        # Outside of the try: what goes wrong here is ours.
        if judged.spec.name not in reference:
            reference[judged.spec.name] = _dense_results(judged)
        truth, *dense = reference[judged.spec.name]
        floor = rounding_floor(judged.rows(dense=False), judged.dtype)
        try:
            require(compare(truth, dense, results, floor), f"{judged.spec.name} {judged.label}")
        except CorrectnessError as error:
            reasons[name] = _one_line(error)
        else:
            variants[engine.label] = variant
    return variants, reasons


def _dense_results(case: OpCase) -> list[dict[str, Tensor]]:
    """Results of dense PyTorch: in float64 first, then of every dense variant in the case's dtype."""
    names = list(case.spec.dense)
    variants = [case.dense_variant(names[-1], torch.float64), *(case.dense_variant(name) for name in names)]
    return [case._results(variant, packed=False) for variant in variants]
