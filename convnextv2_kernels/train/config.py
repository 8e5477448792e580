"""What the command line asks for, the settings a run resolves it to, and the comparison that guards a resume."""

import platform
import re
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .._console import visible
from ..data import MAX_PIXELS
from ..errors import UserError
from .recipes import Resolved

PRECISIONS = ("float32", "bfloat16", "float64")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What every kind of training asks for, defaults filled in; see ``pretrain --help``.

    ``resolved`` are the values that recipes hold, by option name; the rest says where a run lives and on what it runs.
    ``value_range`` and ``max_pixels``: see :func:`convnextv2_kernels.data.value_range.choose_range`.
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
    loader_timeout: float
    peer_timeout: float
    save_every: int
    keep: int
    max_steps: int | None
    tensorboard: bool
    parallel: str
    accumulate: int
    command: tuple[str, ...]
    value_range: tuple[float, float] | str | None = None
    max_pixels: int = MAX_PIXELS

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
class PretrainOptions(TrainOptions):
    """Of ``pretrain``. ``init``: weights to start from; ``use_ema`` takes their average."""

    encoding: str
    init: Path | None
    use_ema: bool
    decoder: str = "convnext"


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainOptions):
    """Of ``finetune``. ``val`` None: the folder's own validation part, or a share ``val_share`` of its images.
    ``init_grn``: "drop" or "add" GRN between pre-training and fine-tuning (Table 2f)."""

    data: Path
    val: Path | None
    val_share: float
    init: Path | None
    use_ema: bool
    crop_pct: float | None
    eval_only: bool
    eval_every: int
    init_grn: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the losses of a run; two runs with equal configs are the same run.

    What only decides how far it goes, how it is stored and on how many processes it runs (workers, checkpoints, a limit
    of steps, accumulation) is not in here, and may change on a resume.

    ``value_range`` is that of :class:`convnextv2_kernels.data.decoding.Decoding`, None where no image has more than 8
    bits. ``batch_size`` counts the images of an optimiser step, over all processes. ``lr`` is the peak of the schedule,
    which ends at ``min_lr``. ``precision``: "bfloat16" is autocast over float32 weights, the others are the dtype of
    all.
    """

    model: str
    img_size: tuple[int, int]
    grn: str = "default"
    layer_scale: float | None = None
    epochs: int
    batch_size: int
    lr: float
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float
    warmup_epochs: float
    clip_grad: float | None = None
    ema_decay: float | None = None
    seed: int
    backend: str
    device: str
    precision: str = "float32"
    data: str
    num_images: int
    images_sha256: str
    value_range: tuple[float, float] | None = None

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

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, as stored in checkpoints and in config.json."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Of FCMAE pre-training. ``micro_batch`` is the number of images that share one GRN norm or batch norm, None where
    each image has its own (``grn_scope`` "image"). ``hflip`` is the share of crops that is mirrored; ``decay`` names
    the parameters that decay (:data:`.optim.DECAYS`); ``encoding``, ``decoder`` and ``grn_scope`` as in
    :class:`convnextv2_kernels.models.FCMAE`; ``init`` says which weights a run starts from, by their digest."""

    patch_size: int
    mask_ratio: float
    norm_pix_loss: bool
    decoder_depth: int = 1
    decoder_embed_dim: int = 512
    grn_scope: str = "image"
    micro_batch: int | None = None
    encoding: str = "sparse"
    hflip: float = 0.5
    decay: str = "standard"
    init: str = "random"
    decoder: str = "convnext"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Of fine-tuning, names as in :mod:`.recipes`. ``init`` says which weights a run starts from, by their digest;
    ``micro_batch`` is the number of images that are mixed among each other or share a batch norm, None where there is
    neither; ``init_grn`` as in :class:`FinetuneOptions`."""

    num_classes: int
    init: str
    drop_path: float
    layer_decay: float
    layer_decay_kind: str
    smoothing: float
    mixup: float
    cutmix: float
    mix_prob: float
    switch_prob: float
    micro_batch: int | None
    aa: str | None
    color_jitter: float | None
    hflip: float
    crop_scale: float
    reprob: float
    head_init_scale: float
    crop_pct: float | None
    init_grn: str | None = None


def require_same_config(saved: dict[str, Any], current: RunConfig, where: str, checkpoint: Path | None = None) -> None:
    """Raise UserError naming each setting in which a checkpoint differs from this run.

    A field that the checkpoint lacks, because it is older than the field, has its default. ``checkpoint``: a file of
    it, from which another run could be started.
    """
    now = current.to_dict()
    before = {field.name: _plain(field.default) for field in fields(current) if field.default is not MISSING} | saved
    changed = [
        name
        for name, value in now.items()
        if before.get(name) != value and name != "images_sha256" and not _old_range(name, saved, value)
    ]
    differences = [
        f"{name}: {_said(before.get(name, 'not recorded'))} in the checkpoint, {_said(now[name])} now"
        for name in changed
    ]
    if before.get("images_sha256") != now["images_sha256"]:
        differences.append("images: the list of files is not that of the checkpoint")
    elif isinstance(current, PretrainConfig) and "epochs" in changed and {*changed} <= {"epochs", "warmup_epochs"}:
        raise UserError(
            f"{where} was written with --epochs {saved.get('epochs')}, and --epochs is now {current.epochs}: the "
            "learning rate schedule spans them, so this run cannot resume from it. Restore "
            f"--epochs {saved.get('epochs')}; or train its weights on, under a new schedule, with --init "
            f"{checkpoint or where} and another --output."
        )
    if differences:
        raise UserError(
            f"{where} was written with other settings, so this run cannot resume from it; "
            + "; ".join(differences)
            + ". Restore these settings, or give a new --output."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _said(value: Any) -> str:
    return visible(textwrap.shorten(str(value), 300, placeholder=" ..."))


def _old_range(name: str, saved: dict[str, Any], value: Any) -> bool:
    """Whether this is the range that 16-bit values were mapped from before it was recorded."""
    return name == "value_range" and saved.get(name) is None and value == [0, 2**16 - 1]


# Options that are not called like the library's arguments.
_OPTIONS = {
    "model name": "--model",
    "drop_path_rate": "--drop-path",
    "decoder_embed_dim": "--decoder-width",
    "prob": "--mix-prob",
}


def in_options(sentence: str, names: Iterable[str] | None = None) -> str:
    """A sentence of the library that begins with an argument's name, with the name of the option instead; ``names``:
    of the options, those of the training commands if not given."""
    if names is None:
        names = {field.name for kind in (PretrainConfig, FinetuneConfig) for field in fields(kind)}
    options = {name: "--" + name.replace("_", "-") for name in names} | _OPTIONS
    named = re.match(rf"({'|'.join(map(re.escape, options))})(?= must | is | needs )", sentence)
    return sentence if named is None else options[named[1]] + sentence[named.end() :].replace(" or None", " or 'none'")


def environment() -> dict[str, Any]:
    """Return what may change the last bits of a loss without changing the run."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def environment_notes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return a note for each part of the environment that is not what it was."""
    return [
        f"{name} was {_said(saved.get(name))} and is {value} now: losses may differ in their last digits"
        for name, value in current.items()
        if name != "python" and saved.get(name) != value
    ]
