"""``pretrain --demo``: a short FCMAE run on bundled photographs, a picture and a comparison."""

import dataclasses
import math
import os
from importlib.util import find_spec

import torch
from rich.table import Table

from .._files import write_json
from .._progress import Screen, format_seconds
from ..backends import use_backend
from ..data.images import RepeatedCrops, load_crop
from ..data.sample_photos import load_photos
from ..errors import UserError
from .checkpoint import export_encoder, list_checkpoints
from .config import PretrainOptions, environment
from .distributed import resolve_device
from .loading import require_shared_memory
from .pretrain import PretrainTask, draw_mask
from .reconstruction import describe_errors, reconstruct, save_picture
from .setup import build_fcmae, hidden_share, prepare_output, pretrain_config, require_backend
from .signals import folder_lock
from .trainer import Spread, Storage, train
from .weights import describe


def run_demo(options: PretrainOptions) -> int:
    """Train on the bundled photographs for ``options.max_steps`` steps; return the exit code.

    Deterministic given the options, keeps no checkpoints, and starts over when run again.
    """
    if find_spec("matplotlib") is None:
        raise UserError("the demo draws a picture with matplotlib: pip install matplotlib.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the demo runs in one process: start it without torchrun.")
    names, photos = load_photos()
    require_shared_memory(options.workers, options.batch_size * 3 * math.prod(options.img_size))
    require_backend(options)
    device = resolve_device(options.device)
    model = build_fcmae(options, device)
    prepare_output(options.output)
    if list_checkpoints(options.output):
        raise UserError(
            f"--output {options.output}: holds checkpoints of another run, whose log and config "
            "the demo would overwrite; give it a folder of its own."
        )
    steps, batch = options.max_steps, options.batch_size
    # One epoch as long as the demo: each crop of it is drawn anew from one of the photographs.
    config = dataclasses.replace(
        pretrain_config(options, device, "bundled photographs", names), num_images=steps * batch
    )
    console = Screen(soft_wrap=True)
    console.print(
        f"{config.model}: {steps} steps of {batch} random crops of {len(photos)} photographs "
        f"({', '.join(names)}), {config.img_size[0]} px, {hidden_share(config)}"
    )
    with folder_lock(options.output), use_backend(options.backend):
        settings = {"config": config.to_dict(), "environment": environment()}
        write_json(options.output / "config.json", settings)
        crops = RepeatedCrops(photos, config.img_size, config.seed, steps * batch)
        outcome = train(
            PretrainTask(model, crops, config),
            Storage(options.output, checkpoints=False),
            Spread(workers=options.workers, loader_timeout=options.loader_timeout),
        )
        if outcome.stop_signal is not None:
            print(f"Stopped after step {outcome.step} of {steps}. The demo keeps no checkpoints.")
            return 128 + outcome.stop_signal
        console.print(
            f"{steps} steps in {format_seconds(outcome.seconds)}, {steps * batch / outcome.seconds:.1f} images/s"
        )
        _show(console, options, config, model, photos)
        _compare(console, options)
    return 0


def _show(console, options, config, model, photos) -> None:
    pixels = torch.stack([load_crop(photo, config.img_size, None) for photo in photos])
    # A step beyond the last: masks that training has not drawn.
    mask = draw_mask(config, len(pixels), config.total_steps)
    result = reconstruct(model, pixels, mask)
    picture, encoder = options.output / "reconstruction.png", options.output / "encoder.safetensors"
    save_picture(
        picture,
        result,
        f"FCMAE {config.model} after {config.total_steps} steps on random crops of these "
        "photographs, under masks not drawn in training",
    )
    export_encoder(encoder, model, describe(config))
    console.print("\nMean squared error over the hidden pixels (0..1 scale), predicting with")
    for line in describe_errors(result):
        console.print(f"  {line}")
    console.print(f"The masks are new to the model, the photographs are not. Picture: {picture}, encoder: {encoder}")


def _compare(console: Screen, options: PretrainOptions) -> None:
    from ..benchmark import compare_fcmae_step

    console.print("\nOne training step (forward and backward), measured now on this machine:")
    size = options.img_size[0]
    c = compare_fcmae_step(options.model, options.batch_size, img_size=size, repeats=3)
    table = Table("", "time", "saved for backward")
    table.add_row("sparse (this library)", f"{c['sparse_ms']:.0f} ms", _mib(c["sparse_bytes"]))
    table.add_row("masked dense PyTorch", f"{c['dense_ms']:.0f} ms", _mib(c["dense_bytes"]))
    table.add_row("dense / sparse", f"{c['time_ratio']:.1f}x", f"{c['bytes_ratio']:.1f}x")
    console.print(table)
    console.print(
        f"Masked dense is the fastest of its uncompiled variants here ({c['dense_variant']}); "
        "'bench' measures with care and compiles them too."
    )


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"
