"""What the command line asks for, before any data is seen."""

from dataclasses import dataclass
from pathlib import Path

from .recipes import Resolved


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every kind of training asks for, defaults filled in; see ``pretrain --help``.

    ``resolved`` are the values that recipes hold, by option name; the rest says where a run lives and on what it runs.
    """

    data: Path | None
    model: str
    img_size: tuple[int, int]
    grn: str
    resolved: Resolved
    seed: int
    backend: str
    device: str
    output: Path
    workers: int
    save_every: int
    keep: int
    max_steps: int | None
    tensorboard: bool
    parallel: str
    accumulate: int
    command: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        """Images of an optimiser step, over all processes."""
        return self.resolved.values["batch_size"]

    @property
    def lr(self) -> float:
        """Peak learning rate: as given, or by the linear rule from the recipe's rate for 256 images."""
        values = self.resolved.values
        return values["lr"] if "lr" in values else values["blr"] * self.batch_size / 256


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(Options):
    """Of ``pretrain``."""

    encoding: str


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Options):
    """Of ``finetune``. ``val`` None: the folder's own validation part, or a share ``val_share`` of its images."""

    val: Path | None
    val_share: float
    init: Path | None
    use_ema: bool
    crop_pct: float | None
    eval_only: bool
    eval_every: int
