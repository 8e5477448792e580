"""The steps that every run begins with: device, model, output folder, settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .._console import visible
from .._files import read_json, write_json
from ..data.folder import fingerprint
from ..data.value_range import Range, range_of
from ..errors import FileError, UserError
from ..layout import mask_fault, num_kept
from ..models import FCMAE, create_fcmae
from ..nn import GRNVariant
from ..sizes import V1_NAMES, block_of, size_text
from .checkpoint import list_checkpoints
from .checkpoint_checks import check_config, require
from .config import (
    PretrainConfig,
    PretrainOptions,
    RunConfig,
    TrainOptions,
    environment,
    in_options,
    require_same_config,
)
from .distributed import World
from .trainer import Spread, Storage

PATCH = 32  # pixels of a patch's side
MODEL_VALUES = ("mask_ratio", "norm_pix_loss", "decoder_depth", "decoder_embed_dim", "grn_scope")
SHARED_VALUES = (
    "epochs",
    "batch_size",
    "min_lr",
    "betas",
    "weight_decay",
    "warmup_epochs",
    "clip_grad",
    "ema_decay",
    "precision",
)

Config = TypeVar("Config", bound=RunConfig)
Options = TypeVar("Options", bound=TrainOptions)


def build_fcmae(options: PretrainOptions, device: str) -> FCMAE:
    """Create the FCMAE of a run on its device, initialised from its seed."""
    torch.manual_seed(options.seed)
    values = options.resolved.values
    if any(side % PATCH for side in options.img_size):
        raise UserError(
            f"--img-size {size_text(options.img_size)} must have sides that are multiples of {PATCH} pixels, a patch."
        )
    grid = options.img_size[0] // PATCH, options.img_size[1] // PATCH
    if (fault := mask_fault(grid, values["mask_ratio"], PATCH, "--mask-ratio", "--img-size")) is not None:
        raise UserError(f"{fault}.")
    try:
        model = create_fcmae(
            options.model,
            img_size=options.img_size,
            grn=options.grn,
            encoding=options.encoding,
            decoder=options.decoder,
            **{name: values[name] for name in MODEL_VALUES},
        )
    except ImportError as error:
        raise UserError(f"{in_options(str(error))}.") from error
    except (ValueError, TypeError) as error:
        raise UserError(in_options(str(error))) from error
    return model.to(device, torch.float64 if values["precision"] == "float64" else torch.float32)


def make_config(
    kind: type[Config], options: TrainOptions, device: str, data: str, images: list[str], **more: Any
) -> Config:
    """Return the settings of a run on ``images``; ``data`` says where they come from, ``more`` is the kind's own."""
    values = options.resolved.values
    if values["min_lr"] > options.lr:
        raise UserError(
            f"--min-lr {values['min_lr']:g} must be at most the peak learning rate, which is {options.lr:.3g} for "
            f"{options.batch_size} images a step."
        )
    return kind(
        model=options.model,
        img_size=options.img_size,
        grn=str(GRNVariant.of(options.grn)),
        layer_scale=block_of(options.model).get("layer_scale"),
        lr=options.lr,
        seed=options.seed,
        backend=options.backend,
        device=torch.device(device).type,
        data=data,
        num_images=len(images),
        images_sha256=fingerprint(images),
        **{name: values[name] for name in SHARED_VALUES},
        **more,
    )


def require_backend(options: TrainOptions, encoding: str = "sparse") -> None:
    """Raise UserError where ``--backend`` has no kernels for the GRN or the encoding, where a V1 has a GRN, or where
    ``--parallel fsdp`` meets a layer with running statistics."""
    plain = f"--encoding {encoding}" if encoding == "masked_dense" else f"--grn {options.grn}"
    try:
        variant = GRNVariant.of(options.grn)
    except ValueError as error:
        raise UserError(in_options(str(error))) from error
    if options.model in V1_NAMES and str(variant) != "none":
        raise UserError(
            f"--grn {options.grn} must be none for --model {options.model}, a ConvNeXt V1, which has no GRN."
        )
    if variant.batch_statistics and options.parallel == "fsdp":
        raise UserError(
            f"--grn {options.grn} keeps running statistics, which --parallel fsdp does not share between processes; "
            "take --parallel ddp."
        )
    needs_plain = encoding == "masked_dense" or not variant.fused
    if needs_plain and options.backend not in ("auto", "reference"):
        raise UserError(
            f"{plain} runs in plain PyTorch only, and --backend is {options.backend}; take --backend auto or reference."
        )


def require_several_sites(options: TrainOptions, parts: int, sites: int) -> None:
    """Raise UserError where a batch norm would train on a single site, which has no variance: of a step in ``parts``,
    with ``sites`` of an image at the last stage."""
    if GRNVariant.of(options.grn).batch_statistics and options.batch_size // parts * sites == 1:
        raise UserError(
            f"--grn {options.grn} trains on a batch of at least 2 visible sites of stride 32, and --batch-size "
            f"{options.batch_size} over {parts} part(s) at --img-size {size_text(options.img_size)} has 1; take a "
            "larger batch or larger images."
        )


def pretrain_config(
    options: PretrainOptions,
    device: str,
    data: str,
    images: list[str],
    processes: int = 1,
    init: str = "random",
    value_range: Range | None = None,
) -> PretrainConfig:
    """:func:`make_config` of pre-training."""
    values = options.resolved.values
    parts = processes * options.accumulate
    grid = options.img_size[0] // PATCH, options.img_size[1] // PATCH
    require_several_sites(options, parts, num_kept(grid, values["mask_ratio"]))
    together = values["grn_scope"] == "batch" or GRNVariant.of(options.grn).batch_statistics
    micro_batch = options.batch_size // parts if together else None
    own = (*MODEL_VALUES, "hflip", "decay")
    return make_config(
        PretrainConfig,
        options,
        device,
        data,
        images,
        patch_size=PATCH,
        init=init,
        encoding=options.encoding,
        decoder=options.decoder,
        micro_batch=micro_batch,
        value_range=value_range,
        **{name: values[name] for name in own},
    )


def storage_of(options: TrainOptions) -> Storage:
    """Where and how often the run is stored."""
    return Storage(options.output, options.save_every, options.keep, tensorboard=options.tensorboard)


def split_of(options: TrainOptions, world: World) -> Spread:
    """How the run's steps are split."""
    return Spread(world, options.parallel, options.accumulate, options.workers, options.loader_timeout)


def write_settings(options: TrainOptions, config: RunConfig) -> None:
    """Write config.json: the settings that decide the losses, where each came from, and the rest.

    Raises UserError, and leaves the file as it is, where the folder's checkpoints are of other settings.
    """
    path = options.output / "config.json"
    if checkpoints := list_checkpoints(options.output):
        saved = _saved_settings(path, config)
        require_same_config(saved, config, str(path), checkpoints[0][1])
    rest = (
        "workers",
        "loader_timeout",
        "peer_timeout",
        "save_every",
        "keep",
        "max_steps",
        "tensorboard",
        "parallel",
        "accumulate",
        "max_pixels",
    )
    resolved = {
        "config": config.to_dict(),
        "recipe": {"name": options.resolved.recipe, "note": options.resolved.note, "origins": options.resolved.origins},
        "environment": environment(),
        "storage": {name: getattr(options, name) for name in rest},
    }
    try:
        write_json(path, resolved)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _saved_settings(path: Path, config: RunConfig) -> dict[str, Any]:
    """The settings in config.json, which may have been edited."""
    try:
        content = read_json(path)
        require(isinstance(content, dict), "the content", content, "an object")
        if "config" not in content:
            raise ValueError("config is missing")
        check_config(content["config"], config)
    except (OSError, ValueError) as error:
        reason = visible(getattr(error, "strerror", None) or str(error))
        raise UserError(
            f"{path.parent} holds checkpoints, but config.json beside them cannot be read ({reason}); give another "
            "--output to start afresh."
        ) from error
    return content["config"]


def with_recorded(options: Options) -> Options:
    """The options of a run with the values that it began with, where earlier versions resolved them to others."""
    if not options.resolved.former or not list_checkpoints(options.output):
        return options
    try:
        recorded = read_json(options.output / "config.json")["config"]
        return replace(options, resolved=options.resolved.keeping(recorded))
    except (OSError, FileError, KeyError, TypeError, AttributeError):
        return options  # write_settings says what is wrong with the file


def kept_range(output: Path) -> Range | None:
    """The value range that a run began with, by its config.json."""
    try:
        return range_of(read_json(output / "config.json")["config"]["value_range"])
    except (OSError, FileError, KeyError, TypeError):
        return None  # where that matters, write_settings says what is wrong with the file


def prepare_output(path: Path) -> None:
    """Create the output folder; raise UserError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be made a folder ({error.strerror}).") from error


def hidden_share(config: PretrainConfig) -> str:
    """The share of the patches that masks hide, which is not quite ``mask_ratio``: patches are whole."""
    patches = config.grid[0] * config.grid[1]
    hidden = patches - num_kept(config.grid, config.mask_ratio)
    return f"{100 * hidden / patches:.0f} % hidden ({hidden} of {patches} patches)"


def parameters_of(model: nn.Module) -> str:
    """The number of parameters, in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
