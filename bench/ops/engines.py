"""Sparse convolution engines of other projects as optional arms of the op benchmark, on a CPU in float32.

Nothing here is needed: an engine that is not installed, fails to import, raises or computes something else is left out,
with the reason. Two engines compute our depthwise convolution; spconv has no groups, so its arm is another operation,
marked by ``comparable`` and never to be put in a ratio.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from convnextv2_kernels.benchmark.correctness import GateError, compare, require, rounding_floor

from .engine_adapters import PeerArm, full_channel_case, minkowski_engine, sparse_conv_net, spconv_full_channel
from .measure import OpCase


@dataclass(frozen=True)
class Peer:
    """An engine: its name, the module to import, what its arm is called, and how to build it.

    Attributes:
        case: what the arm is built for and judged by, of the case that is benchmarked.
    """

    name: str
    module: str
    operation: str
    build: Callable[[OpCase], PeerArm]
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


PEERS = (
    Peer("SparseConvNet", "sparseconvnet", "groups=C", sparse_conv_net),
    Peer("MinkowskiEngine", "MinkowskiEngine", "channelwise", minkowski_engine),
    Peer("spconv", "spconv.pytorch", "dense-channel (other operation)", spconv_full_channel, full_channel_case),
)
BY_NAME = {peer.name: peer for peer in PEERS}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def available() -> dict[str, str | None]:
    """For every engine, by name: None when it can be imported, or one sentence why it cannot."""
    reasons: dict[str, str | None] = {}
    for peer in PEERS:
        try:
            peer.load()
            reasons[peer.name] = None
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == peer.package
            failure = f"import of {peer.module} fails with {_one_line(error)}"
            reasons[peer.name] = f"{peer.package} is not installed" if missing else failure
    return reasons


def peer_arms(case: OpCase) -> tuple[dict[str, PeerArm], dict[str, str]]:
    """Arms of the engines that compute a depthwise case right, by label, and why the others are left out, by name.

    Each arm has passed the gate of our own op (:mod:`.gate`), on this very case, with its maps already built; the
    comparison is with dense PyTorch of the operation the arm computes. Both are empty unless the case is a depthwise
    convolution in float32 on a CPU. Nothing an engine raises gets out of here.
    """
    arms: dict[str, PeerArm] = {}
    reasons: dict[str, str] = {}
    if case.spec.name != "depthwise_conv" or case.dtype != torch.float32 or case.x.device.type != "cpu":
        return arms, reasons
    if case.mask.all():
        return arms, {peer.name: "the case has no visible site" for peer in PEERS}
    reference: dict[str, list[dict[str, Tensor]]] = {}
    for name, reason in available().items():
        if reason is not None:
            reasons[name] = reason
            continue
        peer = BY_NAME[name]
        judged = peer.case(case)
        try:
            arm = peer.build(judged)
            results = judged._results(arm, packed=True)
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
        except GateError as error:
            reasons[name] = _one_line(error)
        else:
            arms[peer.label] = arm
    return arms, reasons


def _dense_results(case: OpCase) -> list[dict[str, Tensor]]:
    """Results of dense PyTorch: in float64 first, then of every dense arm in the case's dtype."""
    names = list(case.spec.dense)
    arms = [case.dense_arm(names[-1], torch.float64), *(case.dense_arm(name) for name in names)]
    return [case._results(arm, packed=False) for arm in arms]
