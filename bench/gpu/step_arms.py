"""Both sides of an FCMAE training step on one device: weights, batch, eager steps and steps in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from .setting import Setting, Skip

import convnextv2_kernels as ck
from convnextv2_kernels.benchmark.baseline import Variant
from convnextv2_kernels.benchmark.correctness import (
    GateError,
    compare,
    relative_error,
    require,
    results_of,
    rounding_floor,
)
from convnextv2_kernels.benchmark.variants import SPARSE, Arm, make_batch, make_dense, make_sparse, make_truth

GATE_IMAGES = 2
AMP = torch.bfloat16


@dataclass
class DeviceArm(Arm):
    """An arm under bf16 autocast of the device its batch lives on; its convolutions by cuDNN, or by PyTorch's own
    kernels."""

    cudnn: bool = True

    def convolutions(self):
        """Context in which a whole step, backward included, has the convolutions it is to have."""
        return torch.backends.cudnn.flags(enabled=self.cudnn, benchmark=True)

    def native(self) -> DeviceArm:
        """The same arm with PyTorch's own convolutions."""
        return DeviceArm(f"{self.name} native", self.model, self.run, self.variant, cudnn=False)


@dataclass
class Step:
    """A whole training step, forward and backward; ``run`` returns the loss where it is at hand."""

    name: str
    run: Callable[[], Tensor | None]
    model: nn.Module

    @property
    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def _ours(how: str, maps: torch.dtype | None) -> str:
    return f"ours {how}" if maps is None else f"ours {how}, {str(maps).removeprefix('torch.')} maps"


class Contest:
    """Ours against masked dense PyTorch for one model and batch, all with the same weights, images and masks.

    Images and masks are made beforehand. Ours builds its layout from the ids of the visible patches in every step.
    """

    def __init__(self, size: str, images: int, setting: Setting):
        self.size, self.images, self.setting = size, images, setting
        torch.backends.cudnn.benchmark = True  # the dense network at its best
        img_size = 64 if setting.dry_run else 224
        self.grid = (img_size // 32, img_size // 32)
        self.batch = make_batch(images, img_size, 0, AMP, setting.device)
        self.kept = (~self.batch.mask).flatten(1).nonzero()[:, 1].view(images, -1)
        self.model = make_sparse(f"convnextv2_{size}", 0, setting.device).model
        self.sparse = DeviceArm(SPARSE, self.model, self._run_sparse)

    def _run_sparse(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with ck.use_backend(self.setting.backend):
            return self.model(images, mask)[:2]

    def _loss(self, model: nn.Module, images: Tensor, maps: torch.dtype | None = None) -> Tensor:
        model.encoder.feature_dtype = maps
        with ck.use_backend(self.setting.backend):
            return model(images, ck.PatchLayout.from_kept(self.kept, self.grid))[0]

    def dense(self, variant: Variant) -> DeviceArm:
        """A masked dense arm; under ``torch.compile`` if the variant says so (nothing is compiled before it runs)."""
        (arm,) = make_dense(self.sparse, [variant])
        return DeviceArm(arm.name, arm.model, arm.run, variant)

    def eager(self, arm: DeviceArm | None = None, maps: torch.dtype | None = None) -> Step:
        """Our step, with feature maps of another dtype than the images if so asked, or that of a dense arm, launched
        kernel by kernel."""

        def run() -> Tensor:
            if arm is None:
                with torch.autocast(self.setting.device, AMP):
                    loss = self._loss(self.model, self.batch.images, maps)
                loss.backward()
            else:
                with arm.convolutions():
                    loss = arm.forward(self.batch)[0]
                    loss.backward()
            model.zero_grad(set_to_none=True)
            return loss.detach()

        model = self.model if arm is None else arm.model
        return Step(_ours("eager", maps) if arm is None else arm.name, run, model)

    def graphed(self, arm: DeviceArm | None = None, maps: torch.dtype | None = None) -> Step:
        """The same in one CUDA graph; by the same function on both sides."""
        if self.setting.dry_run:
            raise Skip("no GPU: CUDA graphs")
        if arm is None:
            step = ck.make_graphed_step(
                self.model, self.batch.images, lambda m, x: self._loss(m, x, maps), autocast=AMP
            )
            return Step(_ours("graph", maps), self._replay(step, self.model), self.model)
        with arm.convolutions():
            step = ck.make_graphed_step(arm.run, self.batch.images, lambda m, x: m(x, self.batch.mask)[0], autocast=AMP)
        return Step(f"{arm.name} graph", self._replay(step, arm.model), arm.model)

    def _replay(self, step: Callable[[Tensor], Tensor], model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = step(self.batch.images)
            model.zero_grad(set_to_none=True)  # an eager step that follows must not add to these gradients
            return loss

        return run

    def check(self, arms: list[DeviceArm]) -> dict:
        """Loss, prediction and all gradients of two images against dense float64; raises GateError when red."""
        few = self.batch.head(GATE_IMAGES)
        with torch.device(self.setting.device):
            truth = results_of(make_truth(self.sparse), few.to_float64())
        rows = compare(
            truth,
            [results_of(arm, few) for arm in arms],
            results_of(self.sparse, few),
            rounding_floor(64 * int((~few.mask).sum()), AMP),
        )
        return require(rows, f"FCMAE {self.size}")

    def same_loss(self, step: Step, expected: Tensor) -> None:
        """Raises GateError unless the loss of a step on the timed batch is the expected one up to rounding."""
        loss = step.run()
        if loss is None:
            return
        floor = rounding_floor(64 * int((~self.batch.mask).sum()), AMP)
        error = relative_error(loss, expected.double())
        if not error <= floor:
            raise GateError(f"loss of {step.name!r} is {float(loss):.6g}, expected {float(expected):.6g}")
