"""The resolved settings of a run, and the comparison that guards a resume."""

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .errors import TrainingError


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the losses of a run; two runs with equal configs are the same run.

    What only decides how far it goes and how it is stored (workers, checkpoints, a limit of steps)
    is not in here, and may change on a resume.
    """

    model: str
    img_size: tuple[int, int]
    patch_size: int
    mask_ratio: float
    norm_pix_loss: bool
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    seed: int
    backend: str
    device: str
    amp: bool
    data: str
    num_images: int
    images_sha256: str

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_images // self.batch_size

    @property
    def total_steps(self) -> int:
        """Steps that the learning rate schedule spans."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return round(self.warmup_epochs * self.steps_per_epoch)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, as stored in checkpoints and in config.json."""
        return {**asdict(self), "img_size": list(self.img_size)}


def require_same_config(saved: dict[str, Any], current: RunConfig, where: str) -> None:
    """Raise TrainingError naming each setting in which a checkpoint differs from this run."""
    now = current.to_dict()
    differences = [
        f"{name}: {saved.get(name, 'not recorded')} in the checkpoint, {value} now"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if differences:
        raise TrainingError(
            f"{where} was written with other settings, so this run cannot go on from it; "
            + "; ".join(differences)
            + ". Restore these settings, or give a new --output."
        )


def environment() -> dict[str, Any]:
    """Return what may change the last bits of a loss without changing the run."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def environment_notes(saved: dict[str, Any]) -> list[str]:
    """Return a note for each part of the environment that is not what it was."""
    return [
        f"{name} was {saved.get(name)} and is {value} now: losses may differ in their last digits"
        for name, value in environment().items()
        if name != "python" and saved.get(name) != value
    ]
