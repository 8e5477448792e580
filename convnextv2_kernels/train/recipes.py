"""The recipes of the ConvNeXt V2 paper (arXiv 2301.00808, appendix A) and of the official scripts, as data.

Where paper and official code differ there is a recipe for each, and ``note`` says in what. A value that neither states
for a recipe is listed in ``assumed``. Names of values are those of the command line's options; any of them can be
overridden.
Learning rates are per 256 images (``blr``); batch sizes are those of an optimiser step over all processes.

Only the standard library is imported here: the command line reads this module for its help.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Values by option name, where they are from, and which of them are assumptions. ``origins`` names the values that
    are from elsewhere than ``source``."""

    source: str
    values: Mapping[str, Any]
    note: str = ""
    assumed: tuple[str, ...] = field(default=())
    origins: Mapping[str, str] = field(default_factory=dict)

    def but(self, source: str, note: str = "", assumed: tuple[str, ...] | None = None, **values: Any) -> "Recipe":
        """Another recipe of ``source``, which differs in ``values``."""
        still_assumed = tuple(name for name in self.assumed if name not in values) if assumed is None else assumed
        origins = {name: origin for name, origin in self.origins.items() if name not in values}
        return Recipe(source, {**self.values, **values}, note, still_assumed, origins)


# ---- pre-training ----

_SCRIPT = Recipe(
    "defaults of the official main_pretrain.py",
    {
        "epochs": 800, "warmup_epochs": 40.0, "batch_size": 64, "blr": 1.5e-4, "min_lr": 0.0, "weight_decay": 0.05,
        "betas": (0.9, 0.95), "clip_grad": None, "ema_decay": None, "mask_ratio": 0.6, "norm_pix_loss": True,
        "decoder_depth": 1, "decoder_embed_dim": 512, "hflip": 0.5, "decay": "standard", "precision": "float32",
        "grn_scope": "image",
    },
    "64 images is the script's batch of one GPU; GRN, biases, norms and the mask token do not decay, and GRN is per "
    "image, as in the paper's Algorithm 1",
    origins={
        "decay": "choice of this program", "grn_scope": "paper Algorithm 1",
        **dict.fromkeys(("min_lr", "clip_grad", "ema_decay", "precision"), "official main_pretrain.py"),
    },
)  # fmt: skip

PRETRAIN: dict[str, Recipe] = {
    "default": _SCRIPT,
    "paper": _SCRIPT.but(
        "paper Table 8",
        "random resized cropping is the only augmentation; the paper gives 800 and 1600 epochs, the longer is taken",
        epochs=1600, batch_size=4096, hflip=0.0,
    ),
    "official": _SCRIPT.but(
        "official TRAINING.md and main_pretrain.py",
        "crops are mirrored too; weight decay takes GRN's gamma and beta and the mask token as well; one GRN norm over "
        "the whole batch of a process. The official double initialisation (deviation 0.88) is not reproduced",
        epochs=1600, batch_size=4096, decay="official", grn_scope="batch",
    ),
}  # fmt: skip

# ---- fine-tuning on ImageNet-1K ----

_FINETUNE = {
    "min_lr": 1e-6, "betas": (0.9, 0.999), "clip_grad": None, "ema_decay": 0.9999, "batch_size": 1024,
    "layer_decay_kind": "single", "aa": "rand-m9-mstd0.5-inc1", "color_jitter": None, "reprob": 0.25, "hflip": 0.5,
    "crop_scale": 0.08, "mix_prob": 1.0, "switch_prob": 0.5, "head_init_scale": 1e-3, "precision": "float32",
}  # fmt: skip
# Of these the tables say nothing.
_BY_SCRIPT = dict.fromkeys(
    ("min_lr", "clip_grad", "color_jitter", "reprob", "hflip", "crop_scale", "mix_prob", "switch_prob", "precision"),
    "official main_finetune.py",
) | {"layer_decay_kind": "paper A.2"}
_SMALL = Recipe(
    "paper Table 9",
    {
        **_FINETUNE, "blr": 2e-4, "epochs": 600, "warmup_epochs": 0.0, "layer_decay": 0.9, "weight_decay": 0.3,
        "drop_path": 0.1, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.2,
    },
    origins=_BY_SCRIPT,
)  # fmt: skip
_TINY = Recipe(
    "paper Table 10 and official TRAINING.md",
    {
        **_FINETUNE, "blr": 8e-4, "epochs": 300, "warmup_epochs": 40.0, "layer_decay": 0.9, "weight_decay": 0.05,
        "drop_path": 0.2, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
    },
    origins=_BY_SCRIPT,
)  # fmt: skip
_BASE = _TINY.but(
    "official TRAINING.md",
    "the paper's Table 11 has ten times this learning rate (recipe convnextv2_base-paper)",
    blr=6.25e-4, epochs=100, warmup_epochs=20.0, layer_decay=0.6, layer_decay_kind="group", drop_path=0.1,
)  # fmt: skip
_LARGE = _BASE.but(
    "paper Table 11",
    "Table 11 gives base and large one learning rate, ten times the documented one (recipe convnextv2_large-paper)",
    assumed=("blr",), drop_path=0.2, blr=6.25e-4,
)  # fmt: skip
_HUGE = _BASE.but(
    "paper Table 11",
    "whether layers decay one by one or in groups is stated for base and large only",
    assumed=("layer_decay_kind",),
    blr=1.25e-3, epochs=50, warmup_epochs=10.0, layer_decay=0.75, layer_decay_kind="single", drop_path=0.3,
)  # fmt: skip
_PAPER_RATE = "the paper's learning rate, ten times that of the official TRAINING.md"

FINETUNE: dict[str, Recipe] = {
    "default": Recipe(
        "defaults of the official main_finetune.py",
        {
            **_FINETUNE, "ema_decay": None, "batch_size": 64, "blr": 5e-4, "epochs": 100, "warmup_epochs": 20.0,
            "layer_decay": 1.0, "weight_decay": 0.05, "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.1,
        },
        "64 images is the script's batch of one GPU",
    ),
    "convnextv2_atto": _SMALL.but("paper Table 9 and official TRAINING.md"),
    "convnextv2_femto": _SMALL.but("paper Table 9", weight_decay=0.05, drop_path=0.0, mixup=0.3, cutmix=0.3),
    "convnextv2_pico": _SMALL.but("paper Table 9", drop_path=0.0, mixup=0.3, cutmix=0.3),
    "convnextv2_nano": _SMALL.but("paper Table 9", mixup=0.5, cutmix=0.5),
    "convnextv2_tiny": _TINY,
    "convnextv2_base": _BASE,
    "convnextv2_base-paper": _BASE.but("paper Table 11", _PAPER_RATE, blr=6.25e-3),
    "convnextv2_large": _LARGE,
    "convnextv2_large-paper": _LARGE.but("paper Table 11", _PAPER_RATE, blr=6.25e-3),
    "convnextv2_huge": _HUGE,
}  # fmt: skip

# ---- with ImageNet-22K in between ----

# size: layer decay and drop path of Table 12, then epochs, layer decay, drop path and average of Table 13
_BY_22K = {
    "nano": (0.9, 0.0, 90, 0.9, 0.1, 0.9999),
    "tiny": (0.9, 0.0, 90, 0.9, 0.1, 0.9999),
    "base": (0.8, 0.1, 30, 0.8, 0.2, 0.9999),
    "large": (0.8, 0.1, 30, 0.8, 0.3, 0.9999),
    "huge": (0.8, 0.3, 30, 0.85, 0.5, None),
}
for _size, (_decay, _drop, _epochs, _decay_1k, _drop_1k, _ema) in _BY_22K.items():
    _name = f"convnextv2_{_size}"
    FINETUNE[f"{_name}-22k"] = FINETUNE[_name].but(
        "paper Table 12 (intermediate fine-tuning on ImageNet-22K)",
        assumed=(),
        blr=2.5e-4, batch_size=4096, epochs=90, warmup_epochs=5.0, layer_decay=_decay, ema_decay=None,
        weight_decay=0.05, drop_path=_drop, mixup=0.8, cutmix=1.0, smoothing=0.1,
    )  # fmt: skip
    FINETUNE[f"{_name}-22k-1k"] = FINETUNE[_name].but(
        "paper Table 13 (ImageNet-1K after 22K)",
        assumed=(),
        blr=2.5e-5, batch_size=512, epochs=_epochs, warmup_epochs=0.0, layer_decay=_decay_1k, weight_decay=1e-8,
        mixup=0.0, cutmix=0.0, smoothing=0.1, drop_path=_drop_1k, ema_decay=_ema,
    )  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """The values of a run, and for each of them where it is from: a recipe's source, "assumed" or "given"."""

    recipe: str
    values: dict[str, Any]
    origins: dict[str, str]
    note: str = ""

    def lines(self) -> list[str]:
        """A table for the terminal: name, value, origin."""
        width = max(map(len, self.origins))
        shown = {name: _show(self.values[name]) for name in self.origins}
        column = max(map(len, shown.values()))
        lines = [f"  {name:<{width}}  {shown[name]:<{column}}  {self.origins[name]}" for name in self.origins]
        return [*lines, f"  ({self.note})"] if self.note else lines


def resolve(recipes: Mapping[str, Recipe], name: str, given: Mapping[str, Any]) -> Resolved:
    """Take a recipe's values, then what was given instead.

    Where the number of epochs is given but not the warm-up, the warm-up keeps its share of them; a given ``lr``
    replaces ``blr``.

    Raises:
        ValueError: no recipe of that name; the message lists them.
    """
    if name not in recipes:
        raise ValueError(f"--recipe must be one of {', '.join(recipes)}; got {name!r}")
    recipe = recipes[name]
    values, origins = dict(recipe.values), {key: recipe.origins.get(key, recipe.source) for key in recipe.values}
    origins.update((key, "assumed, as for the nearest size") for key in recipe.assumed)
    for key, value in given.items():
        if key in values and value is not None:
            values[key], origins[key] = tuple(value) if isinstance(value, list) else value, "given"
    if values.get("ema_decay") == 0:
        values["ema_decay"] = None
    if given.get("lr") is not None:
        del values["blr"], origins["blr"]
        values["lr"], origins["lr"] = given["lr"], "given"
    if given.get("epochs") is not None and given.get("warmup_epochs") is None:
        share = recipe.values["warmup_epochs"] / recipe.values["epochs"]
        values["warmup_epochs"] = share * values["epochs"]
        origins["warmup_epochs"] = f"{share:.1%} of the epochs, as in the recipe"
    return Resolved(name, values, origins, recipe.note)


def _show(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
