"""FCMAE pre-training: the :class:`~.trainer.Task`, and ``pretrain --data FOLDER``, from scan to export."""

import math
import shlex
import signal
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._progress import Progress, count, format_seconds
from ..backends import use_backend
from ..data.decoding import Decoding
from ..data.folder import SKIPPED_NAME, FolderImages, append_skipped, open_folder, reopen_folder, saved_images
from ..data.images import Batch, CropDataset, collate, load_crop, normalize
from ..data.rng import MASK, torch_stream
from ..data.value_range import Range, choose_range, differing_range, range_of
from ..errors import UserError
from ..layout import mask_fault, random_mask
from ..models import FCMAE
from .checkpoint import export_encoder, list_checkpoints, load_checkpoint
from .checkpoint_checks import check_about, require, require_names
from .config import PretrainConfig, PretrainOptions, RunConfig, TrainOptions
from .distributed import World, processes, resolve_device
from .loading import require_shared_memory
from .optim import parameter_groups
from .reconstruction import reconstruct, save_picture
from .setup import (
    build_fcmae,
    hidden_share,
    kept_range,
    parameters_of,
    prepare_output,
    pretrain_config,
    require_backend,
    split_of,
    storage_of,
    with_recorded,
    write_settings,
)
from .signals import folder_lock
from .trainer import Outcome, Span, Trainer, train
from .weights import describe, digest, read_weights


class PretrainTask:
    """Predict the hidden patches of random crops, under masks that are a function of (seed, step, image).

    Raises:
        UserError: the masks would hide all or none of an image's patches.
    """

    def __init__(self, model: FCMAE, dataset: CropDataset, config: PretrainConfig):
        if (fault := mask_fault(config.grid, config.mask_ratio, config.patch_size)) is not None:
            raise UserError(f"{fault}.")
        self.model, self.dataset, self.config = model, dataset, config
        self.collate = collate
        self._mask: tuple[int, Tensor] | None = None

    def parameter_groups(self) -> list[dict]:
        """Decayed or not, as the config says."""
        return parameter_groups(self.model, self.config.weight_decay, self.config.decay)

    def placeholder(self, count: int) -> Batch:
        """Black crops."""
        return Batch(torch.zeros(count, *self.config.img_size, 3, dtype=torch.uint8), [])

    def loss(self, network: nn.Module, batch: Batch, first: int, span: Span) -> Tensor:
        """Reconstruction loss of ``span``."""
        device = next(self.model.parameters()).device
        pixels = batch.images[first : first + span.end - span.begin].to(device, non_blocking=True)
        if self._mask is None or self._mask[0] != span.step:
            self._mask = span.step, draw_mask(self.config, self.config.batch_size, span.step)
        mask = self._mask[1][span.begin : span.end].to(device)
        loss, _, _ = network(normalize(pixels).to(self.config.dtype), mask)
        return loss

    def evaluates(self, epoch: int) -> bool:
        """Never: the log has the losses."""
        return False

    def epoch_done(self, trainer: Trainer, epoch: int) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Any]:
        """What the weights are of; masks and crops are functions of the step."""
        return {"about": describe(self.config)}

    def check(self, state: Any, step: int) -> None:
        """What :meth:`state` returns; checkpoints may be older than what the weights are of."""
        require(isinstance(state, dict), "task", state, "a dict")
        require_names("task", state, (), ("about",))
        check_about(state.get("about", {}), self.state()["about"])

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing of it changes a loss."""


def draw_mask(config: PretrainConfig, num_images: int, step: int) -> Tensor:
    """Return the mask [N, Gh, Gw] of a 0-based step, True = hidden: a function of (seed, step)."""
    generator = torch_stream(config.seed, MASK, step)
    return random_mask(num_images, config.grid, ratio=config.mask_ratio, generator=generator)


NUM_PICTURES = 8


def run_folder(options: PretrainOptions) -> int:
    """Pre-train on ``options.data``; return the exit code of the process."""
    require_backend(options, options.encoding)
    device = resolve_device(options.device)
    with processes(device, options.peer_timeout) as world:
        require_shared_memory(options.workers, options.batch_size // world.size * 3 * math.prod(options.img_size))
        model = build_fcmae(options, device)
        first = _first_weights(options, model, world)
        world.from_main(lambda: prepare_output(options.output))
        lock = folder_lock(options.output) if world.is_main else nullcontext()
        with world.guarded(lock), use_backend(options.backend):
            options = with_recorded(options)
            found, config = world.from_main(lambda: _open(options, device, first, world))
            if world.is_main:
                _describe(options, config, model, found, world)
            decoding = Decoding(config.value_range, options.max_pixels)
            crops = CropDataset(found.paths(), config.img_size, config.seed, config.hflip, decoding)
            task = PretrainTask(model, crops, config)
            outcome = train(task, storage_of(options), split_of(options, world), options.max_steps)
            if world.is_main:
                _conclude(options, config, outcome, found, device)
    return 0 if outcome.stop_signal is None else 128 + outcome.stop_signal


class FirstWeights(NamedTuple):
    """Which weights a run starts from, and the value range of the images that they were trained on."""

    origin: str = "random"
    value_range: Range | None = None


def _first_weights(options: PretrainOptions, model: FCMAE, world: World) -> FirstWeights:
    """Load ``--init`` into the model, where it is given."""
    if options.init is None:
        return FirstWeights()
    values = options.resolved.values
    weights = read_weights(options.init, options.use_ema)
    weights.require(options.model, options.grn)
    weights.require_decoder(values["decoder_depth"], values["decoder_embed_dim"], options.decoder)
    loaded = weights.load_into(model)
    if world.is_main:
        print(f"first weights: {loaded}")
    return FirstWeights(digest(model), range_of(weights.about.get("value_range")))


def _open(
    options: PretrainOptions, device: str, first: FirstWeights, world: World
) -> tuple[FolderImages, PretrainConfig]:
    folder, output = options.data, options.output

    def settle(images: list[str], value_range: Range | None) -> PretrainConfig:
        data = str(folder.resolve())
        config = pretrain_config(options, device, data, images, world.size, first.origin, value_range)
        write_settings(options, config)
        return config

    kept = None
    if not list_checkpoints(output):
        with Progress("checking images", 1) as progress:
            found = open_folder(folder, output, options.batch_size, progress.update, options.max_pixels)
    else:
        # The settings come first: where they differ, nothing of the run is touched.
        kept = kept_range(output)
        given = options.value_range if isinstance(options.value_range, tuple) and kept else kept
        config = settle(saved_images(output), given)
        with Progress("checking images", config.num_images) as progress:
            found = reopen_folder(folder, output, progress.update, options.max_pixels)
    traits = {folder / name: about for name, about in found.traits.items()}
    chosen = choose_range(options.value_range, traits, first.value_range, kept, options.max_pixels)
    differing = differing_range(chosen.value_range, first.value_range, f"--init {options.init}")
    for note in [*(f"note: {text}" for text in found.notes), *chosen.notes, *differing]:
        print(note)
    return found, settle(found.images, chosen.value_range)


def _describe(
    options: PretrainOptions, config: PretrainConfig, model: FCMAE, found: FolderImages, world: World
) -> None:
    print(f"settings (recipe {options.resolved.recipe}; all of them are in {options.output / 'config.json'}):")
    print("\n".join(options.resolved.lines()))
    height, width = config.img_size
    print(
        f"{config.model}, {parameters_of(model)} with decoder, {height}x{width} px, "
        f"{hidden_share(config)}, backend {config.backend} on {config.device}"
        + (f", {world.size} processes ({options.parallel})" if world.size > 1 else "")
    )
    print(
        f"{config.num_images} images in {found.folder}"
        + (f" ({count(len(found.skipped), 'unreadable file')} skipped)" if found.skipped else "")
        + f": {config.steps_per_epoch} steps of {config.batch_size} an epoch, {config.epochs} "
        f"epochs, {config.total_steps} steps, peak learning rate {config.lr:.3g}"
    )
    checkpoints = list_checkpoints(options.output)
    if checkpoints:
        print(f"resuming in {options.output} (newest checkpoint: step {checkpoints[0][0]})")


def _relative(failures: dict[str, str], folder: Path) -> list[tuple[str, str]]:
    return [(Path(name).relative_to(folder).as_posix(), why) for name, why in failures.items()]


def _conclude(
    options: PretrainOptions, config: PretrainConfig, outcome: Outcome, found: FolderImages, device: str
) -> None:
    append_skipped(options.output / SKIPPED_NAME, _relative(outcome.failures, found.folder))
    print_summary(config, outcome)
    skipped = len({name for name, _ in found.skipped} | set(dict(_relative(outcome.failures, found.folder))))
    if skipped:
        listed = options.output / SKIPPED_NAME
        print(f"{count(skipped, 'unreadable file')} skipped, listed in {listed}")
    if outcome.checkpoint is not None:
        print(f"checkpoint: {outcome.checkpoint}")
    if outcome.stop_signal is not None:
        print_stopped(options, outcome)
    elif outcome.step == outcome.total_steps:
        _finish(options, config, outcome, found, device)
    else:
        print_paused(outcome)


def print_summary(config: RunConfig, outcome: Outcome) -> None:
    """Say how much was done and how fast."""
    if outcome.losses:
        last = outcome.losses[-min(100, len(outcome.losses)) :]
        rate = len(outcome.losses) * config.batch_size / max(outcome.seconds, 1e-9)
        print(
            f"{count(len(outcome.losses), 'step')} in {format_seconds(outcome.seconds)}, "
            f"{rate:.1f} images/s, mean loss of the last {len(last)}: {sum(last) / len(last):.4f}"
        )
    elif outcome.step == outcome.total_steps:
        print(f"This run is complete: all {outcome.total_steps} steps were already done.")


def print_stopped(options: TrainOptions, outcome: Outcome) -> None:
    """Say what a signal left, and how to resume."""
    name = signal.Signals(outcome.stop_signal).name
    command = " ".join(shlex.quote(word) for word in options.command)
    after = f"after step {outcome.step} of {outcome.total_steps}, which is saved" if outcome.step else "before step 1"
    print(f"Stopped by {name} {after}.")
    print(f"To resume from there, run the same command again:\n  {command}")


def print_paused(outcome: Outcome) -> None:
    """Say that ``--max-steps`` ended the run."""
    print(f"Stopped at --max-steps {outcome.step} of {outcome.total_steps} steps.")
    print("To resume, run the same command with a larger --max-steps, or without it.")


def _finish(
    options: PretrainOptions, config: PretrainConfig, outcome: Outcome, found: FolderImages, device: str
) -> None:
    state = load_checkpoint(outcome.checkpoint)
    # Built again: the trained model may be in shards.
    model = build_fcmae(options, device)
    model.load_state_dict(state["model"])
    encoder = options.output / "encoder.safetensors"
    about = describe(config)
    export_encoder(encoder, model, about)
    print(f"encoder: {encoder}")
    if "model_ema" in state:
        averaged = options.output / "encoder_ema.safetensors"
        export_encoder(averaged, model, about, state["model_ema"])
        print(f"encoder of averaged weights: {averaged}")
    if find_spec("matplotlib") is None:
        print("no picture was drawn: that needs matplotlib (pip install matplotlib)")
        return
    pixels = _sample_pixels(found, config, options.max_pixels)
    if pixels is None:
        return
    mask = draw_mask(config, len(pixels), config.total_steps)
    result = reconstruct(model, pixels, mask)
    picture = options.output / "reconstruction.png"
    title = f"FCMAE {config.model} after {config.total_steps} steps"
    if config.norm_pix_loss:
        title += " (mean and deviation of each hidden patch are its true ones)"
    save_picture(picture, result, title)
    print(f"picture: {picture}")


def _sample_pixels(found: FolderImages, config: PretrainConfig, max_pixels: int) -> torch.Tensor | None:
    """Load some images spread over the folder, as centred crops uint8 [N, H, W, 3]."""
    paths, decoding = found.paths(), Decoding(config.value_range, max_pixels)
    crops = []
    for path in paths[:: max(1, len(paths) // NUM_PICTURES)]:
        if len(crops) == NUM_PICTURES:
            break
        try:
            crops.append(load_crop(path, config.img_size, None, decoding=decoding))
        except Exception as error:  # Broken since it was checked: the picture can do without.
            print(f"warning: {path} cannot be read ({error})", file=sys.stderr)
    return torch.stack(crops) if crops else None
