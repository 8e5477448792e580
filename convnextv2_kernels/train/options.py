"""What the command line asks for, before any data is seen."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What the command line asks for, defaults filled in; see ``pretrain --help``."""

    data: Path | None
    model: str
    img_size: tuple[int, int]
    mask_ratio: float
    norm_pix_loss: bool
    epochs: int
    batch_size: int
    blr: float
    lr: float | None
    weight_decay: float
    warmup_epochs: float
    seed: int
    backend: str
    device: str
    amp: bool
    output: Path
    workers: int
    save_every: int
    keep: int
    max_steps: int | None
    command: tuple[str, ...]
