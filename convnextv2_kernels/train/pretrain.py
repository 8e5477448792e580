"""``pretrain --data FOLDER``: FCMAE on a folder of the user's images, from scan to export."""

import json
import shlex
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ..backends import use_backend
from ..files import write_json
from .checkpoint import list_checkpoints
from .config import RunConfig, environment, require_same_config
from .data import CropDataset, load_crop
from .errors import TrainingError
from .export import export_encoder
from .files import (
    IMAGES_NAME,
    SKIPPED_NAME,
    FolderImages,
    append_skipped,
    open_folder,
    reopen_folder,
)
from .loop import Outcome, Storage, draw_mask, train
from .options import Options
from .picture import reconstruct, save_picture
from .prepare import build_model, make_config, prepare_output
from .progress import Reporter, count, format_seconds
from .stopping import folder_lock

NUM_PICTURES = 8


def run_folder(options: Options) -> int:
    """Pre-train on ``options.data``; return the exit code of the process."""
    model = build_model(options)
    prepare_output(options.output)
    with folder_lock(options.output), use_backend(options.backend):
        found, config = _open(options, model)
        _describe(options, config, model, found)
        outcome = train(
            model,
            CropDataset(found.paths(), options.img_size, options.seed),
            config,
            Storage(options.output, options.save_every, options.keep),
            options.workers,
            options.max_steps,
        )
        append_skipped(options.output / SKIPPED_NAME, _relative(outcome.failures, found.folder))
        _summarize(options, config, outcome, found)
        if outcome.stop_signal is not None:
            return _stopped(options, outcome)
        if outcome.step == outcome.total_steps:
            _finish(options, config, model, found)
        else:
            print(f"Stopped at --max-steps {outcome.step} of {outcome.total_steps} steps.")
            print("To go on, run the same command with more --max-steps, or without.")
    return 0


def _open(options: Options, model: nn.Module) -> tuple[FolderImages, RunConfig]:
    folder, output = options.data, options.output
    data = str(folder.resolve())
    if not list_checkpoints(output):
        with Reporter("checking images", 1) as reporter:
            found = open_folder(folder, output, options.batch_size, reporter.advance)
        config = make_config(options, model.patch_size, data, found.images)
    else:
        config_path = output / "config.json"
        try:
            images = json.loads((output / IMAGES_NAME).read_text())["images"]
            saved = json.loads(config_path.read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{output} holds checkpoints, but {IMAGES_NAME} or config.json beside them cannot "
                f"be read ({error}); give another --output to start afresh."
            ) from error
        config = make_config(options, model.patch_size, data, images)
        require_same_config(saved, config, str(config_path))
        with Reporter("checking images", len(images)) as reporter:
            found, notes = reopen_folder(folder, output, reporter.advance)
        for note in notes:
            print(f"note: {note}")
    resolved = {"config": config.to_dict(), "environment": environment()}
    resolved["storage"] = {
        name: getattr(options, name) for name in ("workers", "save_every", "keep", "max_steps")
    }
    write_json(output / "config.json", resolved)
    return found, config


def _describe(options: Options, config: RunConfig, model: nn.Module, found: FolderImages) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    height, width = config.img_size
    print(
        f"{config.model}, {parameters / 1e6:.1f} M parameters with decoder, {height}x{width} px, "
        f"{config.mask_ratio:.0%} hidden, backend {config.backend} on {config.device}"
    )
    print(
        f"{config.num_images} images in {found.folder}"
        + (f" ({count(len(found.skipped), 'unreadable file')} skipped)" if found.skipped else "")
        + f": {config.steps_per_epoch} steps of {config.batch_size} an epoch, {config.epochs} "
        f"epochs, {config.total_steps} steps, peak learning rate {config.lr:.3g}"
    )
    checkpoints = list_checkpoints(options.output)
    if checkpoints:
        print(f"going on in {options.output} (newest checkpoint: step {checkpoints[0][0]})")


def _relative(failures: dict[str, str], folder: Path) -> list[tuple[str, str]]:
    return [(Path(name).relative_to(folder).as_posix(), why) for name, why in failures.items()]


def _summarize(options: Options, config: RunConfig, outcome: Outcome, found: FolderImages) -> None:
    if outcome.losses:
        last = outcome.losses[-min(100, len(outcome.losses)) :]
        rate = len(outcome.losses) * config.batch_size / max(outcome.seconds, 1e-9)
        print(
            f"{len(outcome.losses)} steps in {format_seconds(outcome.seconds)}, "
            f"{rate:.1f} images/s, mean loss of the last {len(last)}: {sum(last) / len(last):.4f}"
        )
    elif outcome.step == outcome.total_steps:
        print(f"This run is complete: all {outcome.total_steps} steps were already done.")
    skipped = len(
        {name for name, _ in found.skipped} | set(dict(_relative(outcome.failures, found.folder)))
    )
    if skipped:
        listed = options.output / SKIPPED_NAME
        print(f"{count(skipped, 'unreadable file')} skipped, listed in {listed}")
    if outcome.checkpoint is not None:
        print(f"checkpoint: {outcome.checkpoint}")


def _stopped(options: Options, outcome: Outcome) -> int:
    name = signal.Signals(outcome.stop_signal).name
    command = " ".join(shlex.quote(word) for word in options.command)
    print(f"Stopped by {name} after step {outcome.step} of {outcome.total_steps}, which is saved.")
    print(f"To go on from there, run the same command again:\n  {command}")
    return 128 + outcome.stop_signal


def _finish(options: Options, config: RunConfig, model: nn.Module, found: FolderImages) -> None:
    encoder = options.output / "encoder.safetensors"
    export_encoder(encoder, model, config.model)
    print(f"encoder: {encoder}")
    if find_spec("matplotlib") is None:
        print("no picture was drawn: that needs matplotlib (pip install matplotlib)")
        return
    pixels = _sample_pixels(found, config)
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


def _sample_pixels(found: FolderImages, config: RunConfig) -> torch.Tensor | None:
    """Load some images spread over the folder, as centred crops uint8 [N, H, W, 3]."""
    paths = found.paths()
    crops = []
    for path in paths[:: max(1, len(paths) // NUM_PICTURES)]:
        if len(crops) == NUM_PICTURES:
            break
        try:
            crops.append(load_crop(path, config.img_size, None))
        except Exception as error:  # Broken since it was checked: the picture can do without.
            print(f"warning: {path} cannot be read ({error})", file=sys.stderr)
    return torch.stack(crops) if crops else None
