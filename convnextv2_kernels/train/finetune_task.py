"""Classification as a task of the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.labelled import EvalDataset, LabelledBatch, LabelledDataset, collate_labelled
from ..data.mixing import Mixing, criterion
from ..data.rng import DROP_PATH, torch_stream
from ..errors import UserError
from ..models import ConvNeXtV2
from ..nn import ConvNeXtV2Block
from .checkpoint import whole_model
from .config import FinetuneConfig
from .evaluate import evaluate
from .export import export_weights
from .layer_decay import parameter_groups
from .task import Span
from .trainer import Trainer


class FinetuneTask:
    """Learn the labels of augmented images; evaluate every ``eval_every`` epochs and keep the best weights.

    ``best`` is the best top-1 so far, in percent, its epoch, and whether the averaged weights had it. An
    image's drop path is a function of (seed, step, image); Mixup and CutMix are drawn once for the images of a
    micro-batch, as the official code does for those of a GPU.
    """

    def __init__(
        self,
        model: ConvNeXtV2,
        dataset: LabelledDataset,
        config: FinetuneConfig,
        held_out: EvalDataset,
        output: Path,
        eval_every: int = 1,
        note: Callable[[str], None] = print,
    ):
        self.model, self.dataset, self.config = model, dataset, config
        self.collate = collate_labelled
        self.held_out, self.output, self.eval_every, self.note = held_out, output, eval_every, note
        self.mixing = Mixing(
            config.mixup, config.cutmix, config.mix_prob, config.switch_prob, config.smoothing, config.num_classes
        )
        self.criterion = criterion(self.mixing)
        self.best: dict[str, Any] = {}
        self._blocks = [m for m in model.modules() if isinstance(m, ConvNeXtV2Block) and m.drop_path > 0]
        self._factors: tuple[int, Tensor] | None = None

    def parameter_groups(self) -> list[dict]:
        """With layer-wise decay of the learning rate."""
        config = self.config
        return parameter_groups(self.model, config.weight_decay, config.layer_decay, config.layer_decay_kind)

    def placeholder(self, count: int) -> LabelledBatch:
        """Grey images of the first class."""
        return LabelledBatch(torch.zeros(count, 3, *self.config.img_size), torch.zeros(count, dtype=torch.int64), [])

    def loss(self, network: nn.Module, batch: LabelledBatch, first: int, span: Span) -> Tensor:
        """Cross entropy of ``span``."""
        device = next(self.model.parameters()).device
        part = slice(first, first + span.end - span.begin)
        # A copy: mixing works in place, and a step may have to run again.
        images = batch.images[part].to(device, self.config.dtype, non_blocking=True, copy=True)
        labels = batch.labels[part].to(device, non_blocking=True)
        images, targets = self.mixing.mix(images, labels, (self.config.seed, span.step, span.begin))
        self._set_drop_path(span, device)
        logits = network(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return self.criterion(logits, targets.to(logits.dtype) if targets.is_floating_point() else targets)

    def _set_drop_path(self, span: Span, device: torch.device) -> None:
        if not self._blocks:
            return
        if self._factors is None or self._factors[0] != span.step:
            generator = torch_stream(self.config.seed, DROP_PATH, span.step)
            draws = torch.rand(len(self._blocks), self.config.batch_size, generator=generator, dtype=torch.float64)
            keeps = torch.tensor([[1 - block.drop_path] for block in self._blocks], dtype=torch.float64)
            self._factors = span.step, ((draws < keeps) / keeps).to(device, self.config.dtype)
        for block, factors in zip(self._blocks, self._factors[1], strict=True):
            block.given_drop_path = factors[span.begin : span.end]

    def epoch_done(self, trainer: Trainer, epoch: int) -> None:
        """Evaluate, log, and keep the weights if they are the best so far."""
        if (epoch + 1) % self.eval_every and epoch + 1 != self.config.epochs:
            return
        results = {"": self._evaluate(trainer)}
        if trainer.average is not None:
            with trainer.average.applied(self.model):
                results["ema_"] = self._evaluate(trainer)
        values = {prefix + name: value for prefix, result in results.items() for name, value in result.items()}
        step = trainer.outcome.step
        if trainer.world.is_main:
            trainer.metrics.write({"step": step, "epoch": epoch, **values})
            trainer.board.write(step, values)
        trainer.note(f"epoch {epoch + 1}/{self.config.epochs}: " + "; ".join(map(_told, results.items())))
        # Averaged over few steps, the average is little more than the first weights: the better of the two leads.
        averaged = values.get("ema_top1", -1.0) >= values["top1"]
        leading = values["ema_top1" if averaged else "top1"]
        if leading > self.best.get("top1", -1.0):
            self.best = {"top1": leading, "epoch": epoch, "step": step, "averaged": averaged}
            self._keep_best(trainer)

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        return evaluate(
            self.model,
            self.held_out,
            batch_size=max(1, trainer.share // trainer.split.accumulate),
            world=trainer.world,
            workers=trainer.split.workers,
            precision=self.config.precision,
            note=trainer.note,
        )

    def _keep_best(self, trainer: Trainer) -> None:
        if not self.best["averaged"]:
            weights = whole_model(self.model)
        else:
            with trainer.average.applied(self.model):
                weights = {name: tensor.clone() for name, tensor in whole_model(self.model).items()}
        trainer.world.from_main(lambda: self._write_best(weights))

    def _write_best(self, weights: dict[str, Tensor]) -> None:
        path = self.output / "best.safetensors"
        try:
            export_weights(path, weights, metadata_of(self.config, self.best))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def state(self) -> dict[str, Any]:
        """The best result so far."""
        return {"best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the best result so far."""
        self.best = dict(state["best"])


def metadata_of(config: FinetuneConfig, best: dict[str, Any] | None = None) -> dict[str, str]:
    """What a file of weights says about itself."""
    about = {"model": config.model, "grn": config.grn, "num_classes": str(config.num_classes)}
    return {**about, **{f"best_{name}": str(value) for name, value in (best or {}).items()}}


def _told(item: tuple[str, dict[str, float]]) -> str:
    prefix, result = item
    name = "averaged weights" if prefix else "weights"
    return f"{name}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}"
