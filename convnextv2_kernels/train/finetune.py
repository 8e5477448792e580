"""``finetune``: a classifier on a folder of classes, from scan to evaluation."""

import hashlib
from contextlib import nullcontext

import safetensors
import torch

from .._atomic_io import write_json
from .._progress import count
from ..backends import use_backend
from ..checkpoints import load_checkpoint as load_weights
from ..checkpoints.storage import read_file
from ..data.augment import eval_transform, train_transform
from ..data.classes import ClassFolder, open_split
from ..data.folder import SKIPPED_NAME, append_skipped
from ..data.labelled import EvalDataset, LabelledDataset
from ..errors import UserError
from ..models import ConvNeXtV2, create_model
from ..nn import GRNVariant
from .checkpoint import load_checkpoint
from .config import FinetuneConfig, FinetuneOptions
from .distributed import World, processes
from .evaluate import evaluate
from .export import export_weights
from .finetune_task import FinetuneTask, metadata_of
from .pretrain import print_paused, print_stopped, print_summary
from .setup import make_config, parameters_of, prepare_output, resolve_device, split_of, storage_of, write_settings
from .signals import folder_lock
from .trainer import Outcome, train

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
    device = resolve_device(options.device)
    with processes(device) as world:
        world.from_main(lambda: prepare_output(options.output))
        lock = folder_lock(options.output) if world.is_main else nullcontext()
        with world.guarded(lock), use_backend(options.backend):
            try:
                return _run(options, device, world)
            except ValueError as error:  # what a layer, a transform or a loss says of an argument
                raise UserError(str(error)) from error


def _run(options: FinetuneOptions, device: str, world: World) -> int:
    training, held_out = world.from_main(
        lambda: open_split(options.data, options.val, options.val_share, options.seed, options.output)
    )
    values = options.resolved.values
    model = _build(options, device, len(training.classes))
    pictures = EvalDataset(held_out.paths(), held_out.labels, eval_transform(options.img_size, options.crop_pct))
    if options.eval_only:
        return _evaluate_only(options, model, pictures, world)
    parts = world.size * options.accumulate
    mixing = values["mixup"] > 0 or values["cutmix"] > 0
    config = make_config(
        FinetuneConfig,
        options,
        device,
        str(options.data.resolve()),
        training.images,
        num_classes=len(training.classes),
        init=_origin(options, model),
        micro_batch=options.batch_size // parts if mixing else None,
        crop_pct=options.crop_pct,
        **{name: values[name] for name in VALUES},
    )
    if config.micro_batch is not None and config.micro_batch % 2:
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
    dataset = LabelledDataset(training.paths(), training.labels, transform, config.seed)
    task = FinetuneTask(model, dataset, config, pictures, options.output, options.eval_every)
    outcome = train(task, storage_of(options), split_of(options, world), options.max_steps)
    if world.is_main:
        _conclude(options, config, outcome, task)
    return 0 if outcome.stop_signal is None else 128 + outcome.stop_signal


def _build(options: FinetuneOptions, device: str, num_classes: int) -> ConvNeXtV2:
    torch.manual_seed(options.seed)
    values = options.resolved.values
    model = create_model(
        options.model,
        num_classes=num_classes,
        drop_path_rate=values["drop_path"],
        head_init_scale=values["head_init_scale"],
        grn=options.grn,
    )
    if options.init is not None:
        _require_grn(options)
        try:
            load_weights(model, options.init, skip_head=not options.eval_only, use_ema=options.use_ema)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"--init {options.init}: {error}") from error
    return model.to(device, torch.float64 if values["precision"] == "float64" else torch.float32)


def _require_grn(options: FinetuneOptions) -> None:
    """Weights trained with one GRN mean nothing under another, and their names are the same."""
    try:
        with safetensors.safe_open(options.init, "pt") as file:
            about = file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        try:
            about = read_file(options.init).get("config") or {}
        except (OSError, ValueError):
            about = {}  # load_weights says what is wrong with the file
    stored, wanted = str(about.get("grn", options.grn)), str(GRNVariant.of(options.grn))
    if str(GRNVariant.of(stored)) != wanted:
        raise UserError(f"--init {options.init} was trained with --grn {stored}, and --grn is {wanted}.")


def _origin(options: FinetuneOptions, model: ConvNeXtV2) -> str:
    """Which weights a run starts from: their digest, for a path may hold others tomorrow, and a file that is written
    again may hold the same in other bytes."""
    if options.init is None:
        return "random"
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256 {digest.hexdigest()}"


def _evaluate_only(options: FinetuneOptions, model: ConvNeXtV2, pictures: EvalDataset, world: World) -> int:
    batch = max(1, min(options.batch_size // world.size, 64))
    precision = options.resolved.values["precision"]
    result = evaluate(model, pictures, batch, world, options.workers, precision)
    if world.is_main:
        print(
            f"{result['images']} images: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
            f"loss {result['loss']:.4f}"
        )
        write_json(options.output / "evaluation.json", {"init": str(options.init), **result})
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
            export_weights(path, state[key], metadata_of(config))
            print(f"{'averaged weights' if key == 'model_ema' else 'weights'}: {path}")
