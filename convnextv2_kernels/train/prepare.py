"""The steps that every run begins with: device, model, output folder, settings."""

from pathlib import Path

import torch
from torch import nn

from ..models import create_fcmae
from .config import RunConfig
from .errors import TrainingError
from .files import fingerprint
from .optim import scaled_lr
from .options import Options


def build_model(options: Options) -> nn.Module:
    """Create the FCMAE of a run on its device, initialised from its seed."""
    device = resolve_device(options.device)
    torch.manual_seed(options.seed)
    try:
        model = create_fcmae(
            options.model,
            img_size=options.img_size,
            mask_ratio=options.mask_ratio,
            norm_pix_loss=options.norm_pix_loss,
        )
    except (ValueError, TypeError) as error:
        raise TrainingError(str(error)) from error
    return model.to(device)


def resolve_device(name: str) -> str:
    """Turn ``auto`` into ``cuda`` where there is a GPU, else ``cpu``; check any other name."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name}: cannot be used here ({reason}).") from error
    return name


def make_config(options: Options, patch_size: int, data: str, images: list[str]) -> RunConfig:
    """Return the settings of a run on ``images``; ``data`` says where they come from."""
    return RunConfig(
        model=options.model,
        img_size=options.img_size,
        patch_size=patch_size,
        mask_ratio=options.mask_ratio,
        norm_pix_loss=options.norm_pix_loss,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr or scaled_lr(options.blr, options.batch_size),
        weight_decay=options.weight_decay,
        warmup_epochs=options.warmup_epochs,
        seed=options.seed,
        backend=options.backend,
        device=resolve_device(options.device),
        amp=options.amp,
        data=data,
        num_images=len(images),
        images_sha256=fingerprint(images),
    )


def prepare_output(path: Path) -> None:
    """Create the output folder; raise TrainingError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"--output {path}: cannot be made a folder ({error.strerror})."
        ) from error
