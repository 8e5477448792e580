"""Fine-tuning: classification as a :class:`~.trainer.Task`, and ``finetune``, from scan to evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_json
from .._progress import count
from ..backends import use_backend
from ..data.augment import eval_transform, train_transform
from ..data.classes import ClassFolder, held_out_share, open_split, reopen_split, save_split
from ..data.decoding import Decoding
from ..data.folder import IMAGES_NAME, SKIPPED_NAME, append_skipped
from ..data.labelled import EvalDataset, LabelledBatch, LabelledDataset, collate_labelled
from ..data.mixing import Mixing, criterion
from ..data.rng import DROP_PATH, torch_stream
from ..data.value_range import choose_range, differing_range, range_of
from ..errors import UserError
from ..models import ConvNeXtV2, create_model
from ..nn import ConvNeXtV2Block, GRNVariant
from .checkpoint import export_weights, list_checkpoints, load_checkpoint, whole_model
from .checkpoint_checks import check_about, require, require_names
from .config import FinetuneConfig, FinetuneOptions, in_options
from .distributed import World, processes, resolve_device
from .evaluate import evaluate
from .loading import require_shared_memory
from .optim import layer_decay_groups
from .pretrain import print_paused, print_stopped, print_summary
from .setup import (
    kept_range,
    make_config,
    parameters_of,
    prepare_output,
    require_backend,
    require_several_sites,
    split_of,
    storage_of,
    write_settings,
)
from .signals import folder_lock
from .trainer import Outcome, Span, Trainer, train
from .weights import Weights, compare, describe, digest, read_weights


class FinetuneTask:
    """Learn the labels of augmented images; evaluate every ``eval_every`` epochs and keep the best weights.

    ``best`` is the best top-1 so far, in percent, its epoch, and whether the averaged weights had it. An
    image's drop path is a function of (seed, step, image); Mixup and CutMix are drawn once for the images of a
    micro-batch, as the official code does for those of a GPU. ``classes``: names of the classes, by label.
    """

    def __init__(
        self,
        model: ConvNeXtV2,
        dataset: LabelledDataset,
        config: FinetuneConfig,
        held_out: EvalDataset,
        output: Path,
        classes: Sequence[str],
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
        self.about = describe(config, classes)
        self.best: dict[str, Any] = {}
        self._blocks = [m for m in model.modules() if isinstance(m, ConvNeXtV2Block) and m.drop_path > 0]
        self._drop_path_scale: tuple[int, Tensor] | None = None

    def parameter_groups(self) -> list[dict]:
        """With layer-wise decay of the learning rate."""
        config = self.config
        return layer_decay_groups(self.model, config.weight_decay, config.layer_decay, config.layer_decay_kind)

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
        if self._drop_path_scale is None or self._drop_path_scale[0] != span.step:
            generator = torch_stream(self.config.seed, DROP_PATH, span.step)
            draws = torch.rand(len(self._blocks), self.config.batch_size, generator=generator, dtype=torch.float64)
            keep_prob = torch.tensor([[1 - block.drop_path] for block in self._blocks], dtype=torch.float64)
            self._drop_path_scale = span.step, ((draws < keep_prob) / keep_prob).to(device, self.config.dtype)
        for block, scale in zip(self._blocks, self._drop_path_scale[1], strict=True):
            block.given_drop_path = scale[span.begin : span.end]

    def evaluates(self, epoch: int) -> bool:
        """Every ``eval_every`` epochs, and after the last."""
        return (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.config.epochs

    def epoch_done(self, trainer: Trainer, epoch: int) -> None:
        """Evaluate, log, and keep the weights if they are the best so far."""
        results = {"": self._evaluate(trainer)}
        if trainer.average is not None:
            with trainer.average.applied(self.model):
                results["ema_"] = self._evaluate(trainer)
        values = {prefix + name: value for prefix, result in results.items() for name, value in result.items()}
        step = trainer.outcome.step
        if trainer.world.is_main:
            trainer.metrics.write({"step": step, "epoch": epoch, **values})
            trainer.board.write(step, values)
        trainer.note(f"epoch {epoch + 1}/{self.config.epochs}: " + "; ".join(map(_summary_line, results.items())))
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
            loading=trainer.split.loading,
            precision=self.config.precision,
            note=trainer.note,
            signum=trainer.signum,
        )

    def _keep_best(self, trainer: Trainer) -> None:
        if not self.best["averaged"]:
            weights = whole_model(self.model)
        else:
            with trainer.average.applied(self.model):
                weights = {name: tensor.clone() for name, tensor in whole_model(self.model).items()}
        about = self.about | {f"best_{name}": str(value) for name, value in self.best.items()}
        trainer.world.from_main(lambda: export_weights(self.output / "best.safetensors", weights, about))

    def state(self) -> dict[str, Any]:
        """The best result so far, and what the weights are of."""
        return {"best": self.best, "about": self.about}

    def check(self, state: Any, step: int) -> None:
        """A best result that this run can have."""
        require(isinstance(state, dict), "task", state, "a dict")
        require_names("task", state, ("best",), ("about",))
        check_about(state.get("about", {}), self.about)
        check_best(state["best"], step, self.config)

    def restore(self, state: dict[str, Any]) -> None:
        """Take the best result so far."""
        self.best = dict(state["best"])


def check_best(best: Any, step: int, config: FinetuneConfig) -> None:
    """Raise ValueError, in a sentence that names the field, where ``best`` is none of :attr:`FinetuneTask.best` after
    ``step`` steps."""
    require(isinstance(best, dict), "task.best", best, "a dict")
    if not best:
        return
    require_names("task.best", best, ("top1", "epoch", "step"), ("averaged",))  # files may be older than "averaged"
    top1, epoch, averaged = best["top1"], best["epoch"], best.get("averaged", False)
    require(type(top1) in (int, float) and 0 <= top1 <= 100, "task.best.top1", top1, "a share in percent")
    done = step // config.steps_per_epoch
    fits = type(epoch) is int and 0 <= epoch < done
    require(fits, "task.best.epoch", epoch, f"one of the {done} epochs that are done, from 0 on")
    last = (epoch + 1) * config.steps_per_epoch
    fits = type(best["step"]) is int and best["step"] == last
    require(fits, "task.best.step", best["step"], f"{last}, the last of epoch {epoch}")
    wanted = "False" if config.ema_decay is None else "True or False"
    fits = type(averaged) is bool and (config.ema_decay is not None or not averaged)
    require(fits, "task.best.averaged", averaged, wanted)


def _summary_line(item: tuple[str, dict[str, float]]) -> str:
    prefix, result = item
    name = "averaged weights" if prefix else "weights"
    return f"{name}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}"


LEAST_SIDE = 32
VALUES = (
    "drop_path",
    "layer_decay",
    "layer_decay_kind",
    "smoothing",
    "mixup",
    "cutmix",
    "mix_prob",
    "switch_prob",
    "aa",
    "color_jitter",
    "hflip",
    "crop_scale",
    "reprob",
    "head_init_scale",
)


def run_finetune(options: FinetuneOptions) -> int:
    """Train or evaluate a classifier on ``options.data``; return the exit code of the process."""
    require_backend(options)
    device = resolve_device(options.device)
    with processes(device, options.peer_timeout) as world:
        _require_shared_memory(options, world)
        world.from_main(lambda: prepare_output(options.output))
        lock = folder_lock(options.output) if world.is_main else nullcontext()
        with world.guarded(lock), use_backend(options.backend):
            try:
                return _run(options, device, world)
            except ValueError as error:  # what a layer, a transform or a loss says of an argument
                raise UserError(in_options(str(error))) from error


def _require_shared_memory(options: FinetuneOptions, world: World) -> None:
    image = 3 * 4 * math.prod(options.img_size)  # float32
    if options.eval_only:
        require_shared_memory(options.workers, _eval_batch(options, world) * image)
        return
    # The loaders of an evaluation work beside those of the training.
    share = options.batch_size // world.size
    require_shared_memory(options.workers, share * image, max(1, share // options.accumulate) * image)


def _eval_batch(options: FinetuneOptions, world: World) -> int:
    return max(1, min(options.batch_size // world.size, 64))


def _run(options: FinetuneOptions, device: str, world: World) -> int:
    if min(options.img_size) < LEAST_SIDE:
        height, width = options.img_size
        raise UserError(f"--img-size {height}x{width} must have sides of at least {LEAST_SIDE} pixels.")
    weights = None if options.init is None else read_weights(options.init, options.use_ema)
    if weights is not None:
        weights.require(options.model, options.grn, options.init_grn, may_change=not options.eval_only)
        if options.eval_only:
            weights.require_head()
    training, held_out, decoding = world.from_main(lambda: _open(options, weights))
    values = options.resolved.values
    say = print if world.is_main else lambda text: None
    notes = []
    if options.eval_only:
        notes = _notes(options, weights, training)
    model, origin = _build(options, device, weights, len(training.classes), say)
    transform = eval_transform(options.img_size, options.crop_pct)
    pictures = EvalDataset(held_out.paths(), held_out.labels, transform, decoding)
    if options.eval_only:
        return _evaluate_only(options, model, pictures, world, notes)
    parts = world.size * options.accumulate
    require_several_sites(options, parts, math.prod(side // LEAST_SIDE for side in options.img_size))
    mixing = values["mixup"] > 0 or values["cutmix"] > 0
    together = mixing or GRNVariant.of(options.grn).batch_statistics
    config = make_config(
        FinetuneConfig,
        options,
        device,
        str(options.data.resolve()),
        training.images,
        num_classes=len(training.classes),
        init=origin,
        micro_batch=options.batch_size // parts if together else None,
        crop_pct=options.crop_pct,
        value_range=decoding.value_range,
        init_grn=options.init_grn,
        **{name: values[name] for name in VALUES},
    )
    if mixing and config.micro_batch is not None and config.micro_batch % 2:
        raise UserError(
            f"--batch-size {options.batch_size} over {parts} part(s) leaves {config.micro_batch} images to be mixed in "
            "pairs; take an even number, or --mixup 0 --cutmix 0."
        )
    if len(training.images) < config.batch_size:
        raise UserError(
            f"--data {options.data}: {len(training.images)} images to train on are too few for one batch of "
            f"{config.batch_size}; lower --batch-size to at most {len(training.images)} or add images."
        )

    def settle() -> None:
        write_settings(options, config)  # refuses before anything of another run is touched
        if not list_checkpoints(options.output) or not (options.output / IMAGES_NAME).exists():
            share = held_out_share(options.data, options.val, options.val_share, options.output)
            save_split(options.output, training, held_out, share)
        append_skipped(options.output / SKIPPED_NAME, [*training.skipped, *held_out.skipped])
        write_json(options.output / "classes.json", training.classes)

    world.from_main(settle)
    if world.is_main:
        _describe(options, config, model, training, held_out, world)
    transform = train_transform(
        options.img_size,
        aa=config.aa,
        color_jitter=config.color_jitter,
        hflip=config.hflip,
        scale=(config.crop_scale, 1.0),
        reprob=config.reprob,
    )
    dataset = LabelledDataset(training.paths(), training.labels, transform, config.seed, decoding)
    task = FinetuneTask(model, dataset, config, pictures, options.output, training.classes, options.eval_every)
    outcome = train(task, storage_of(options), split_of(options, world), options.max_steps)
    if world.is_main:
        _conclude(options, config, outcome, task)
    return 0 if outcome.stop_signal is None else 128 + outcome.stop_signal


def _open(options: FinetuneOptions, weights: Weights | None) -> tuple[ClassFolder, ClassFolder, Decoding]:
    """Both parts of the images, and how they are decoded."""
    where = options.data, options.val, options.val_share
    found, kept = None, None
    if not options.eval_only and list_checkpoints(options.output):
        found, kept = reopen_split(*where, options.output, options.max_pixels), kept_range(options.output)
    training, held_out = found or open_split(*where, options.seed, options.output, options.max_pixels)
    traits = {**training.traits_by_path(), **held_out.traits_by_path()}
    recorded = None if weights is None else range_of(weights.about.get("value_range"))
    chosen = choose_range(options.value_range, traits, recorded, kept, options.max_pixels)
    notes = [f"note: {text}" for text in (*training.notes, *held_out.notes)]
    for text in [*notes, *chosen.notes, *differing_range(chosen.value_range, recorded, f"--init {options.init}")]:
        print(text)
    return training, held_out, Decoding(chosen.value_range, options.max_pixels)


def _build(
    options: FinetuneOptions, device: str, weights: Weights | None, num_classes: int, say: Callable[[str], None]
) -> tuple[ConvNeXtV2, str]:
    """The model of a run, and which weights it starts from."""
    torch.manual_seed(options.seed)
    values = options.resolved.values
    try:
        model = create_model(
            options.model,
            num_classes=num_classes,
            drop_path_rate=values["drop_path"],
            head_init_scale=values["head_init_scale"],
            grn=options.grn,
        )
    except ImportError as error:
        raise UserError(f"--{error}.") from error
    if weights is not None:
        loaded = weights.load_into(model, not options.eval_only, options.init_grn)
        say(f"{'evaluating' if options.eval_only else 'first weights:'} {loaded}")
    model = model.to(device, torch.float64 if values["precision"] == "float64" else torch.float32)
    return model, "random" if weights is None else digest(model)


def _notes(options: FinetuneOptions, weights: Weights, training: ClassFolder) -> list[str]:
    """What an evaluation alone should say of its images. Raises UserError where its scores would mean nothing."""
    weights.require_head(len(training.classes), training.folder)
    notes = compare(weights.about, describe(options, training.classes), weights.what, training.folder)
    if held_out_share(options.data, options.val, options.val_share, options.output) is not None:
        notes.append(
            f"evaluated on the share that --val-share {options.val_share:g} and --seed {options.seed} hold out of "
            f"{options.data}; under other values than those of the training it has images that were trained on"
        )
    return notes


def _evaluate_only(
    options: FinetuneOptions, model: ConvNeXtV2, pictures: EvalDataset, world: World, notes: list[str]
) -> int:
    precision = options.resolved.values["precision"]
    for note in notes if world.is_main else ():
        print(f"note: {note}")
    result = evaluate(model, pictures, _eval_batch(options, world), world, split_of(options, world).loading, precision)
    if world.is_main:
        print(
            f"{result['images']} images: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
            f"loss {result['loss']:.4f}"
        )
        about = {"init": str(options.init), "img_size": list(options.img_size), "notes": notes}
        write_json(options.output / "evaluation.json", {**about, **result})
    return 0


def _describe(
    options: FinetuneOptions,
    config: FinetuneConfig,
    model: ConvNeXtV2,
    training: ClassFolder,
    held_out: ClassFolder,
    world: World,
) -> None:
    print(f"settings (recipe {options.resolved.recipe}; all of them are in {options.output / 'config.json'}):")
    print("\n".join(options.resolved.lines()))
    height, width = config.img_size
    print(
        f"{config.model}, {parameters_of(model)}, {height}x{width} px, backend {config.backend} on {config.device}, "
        + ("random weights" if options.init is None else f"weights of {options.init}")
        + (f", {world.size} processes ({options.parallel})" if world.size > 1 else "")
    )
    skipped = len(training.skipped) + len(held_out.skipped)
    print(
        f"{config.num_images} images of {config.num_classes} classes in {training.folder}, {len(held_out.images)} to "
        f"evaluate on in {held_out.folder}"
        + (f" ({count(skipped, 'unreadable file')} skipped, listed in {SKIPPED_NAME})" if skipped else "")
        + f": {config.steps_per_epoch} steps of {config.batch_size} an epoch, {config.epochs} epochs, "
        f"{config.total_steps} steps, peak learning rate {config.lr:.3g}"
    )


def _conclude(options: FinetuneOptions, config: FinetuneConfig, outcome: Outcome, task: FinetuneTask) -> None:
    print_summary(config, outcome)
    if outcome.checkpoint is not None:
        print(f"checkpoint: {outcome.checkpoint}")
    if outcome.stop_signal is not None:
        print_stopped(options, outcome)
        return
    if task.best:
        print(
            f"best top-1 {task.best['top1']:.2f} % after epoch {task.best['epoch'] + 1}: "
            f"{options.output / 'best.safetensors'}"
        )
    if outcome.step < outcome.total_steps:
        print_paused(outcome)
        return
    state = load_checkpoint(outcome.checkpoint)
    for key, name in (("model", "model"), ("model_ema", "model_ema")):
        if key in state:
            path = options.output / f"{name}.safetensors"
            export_weights(path, state[key], task.about)
            print(f"{'averaged weights' if key == 'model_ema' else 'weights'}: {path}")
