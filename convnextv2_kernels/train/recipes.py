"""The recipes of the ConvNeXt V2 paper (arXiv 2301.00808, appendix A) and of the official scripts, as data.

Where paper and official code differ there is a recipe for each, and ``note`` says in what. A value that neither states
for a recipe is listed in ``assumed``, with the reason for it. Names of values are those of the command line's options;
any of them can be overridden.
Learning rates are per 256 images (``blr``); batch sizes are those of an optimiser step over all processes.

:data:`PRETRAIN` and :data:`FINETUNE` are for this program; :data:`DOWNSTREAM` holds what the paper states of COCO and
ADE20K, for users of MMDetection and MMSegmentation. ``info --recipes`` prints all of them.

Only the standard library is imported here: the command line reads this module for its help.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Values by option name, where they are from, and which of them are assumptions, and why. ``origins`` names the
    values that are from elsewhere than ``source``. ``lengths``: the numbers of epochs that a source states, all with
    the warm-up of ``values``."""

    source: str
    values: Mapping[str, Any]
    note: str = ""
    assumed: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[int, str] = field(default_factory=dict)

    def but(
        self,
        source: str,
        note: str = "",
        assumed: Mapping[str, str] | None = None,
        origins: Mapping[str, str] | None = None,
        **values: Any,
    ) -> "Recipe":
        """Another recipe of ``source``, which differs in ``values``; ``origins`` are added to those that still hold."""
        kept = {name: why for name, why in self.assumed.items() if name not in values} if assumed is None else assumed
        before = {name: origin for name, origin in self.origins.items() if name not in values}
        return Recipe(source, {**self.values, **values}, note, kept, {**before, **(origins or {})}, self.lengths)

    def origin(self, name: str) -> str:
        """Where a value is from, or that it is assumed."""
        return f"assumed, {self.assumed[name]}" if name in self.assumed else self.origins.get(name, self.source)


# ---- pre-training ----

_SCRIPT = Recipe(
    "defaults of the official main_pretrain.py",
    {
        "img_size": (224, 224), "epochs": 800, "warmup_epochs": 40.0, "batch_size": 64, "blr": 1.5e-4, "min_lr": 0.0,
        "weight_decay": 0.05, "betas": (0.9, 0.95), "clip_grad": None, "ema_decay": None, "mask_ratio": 0.6,
        "norm_pix_loss": True, "decoder_depth": 1, "decoder_embed_dim": 512, "hflip": 0.5, "decay": "standard",
        "precision": "float32", "grn_scope": "image",
    },
    "64 images is the script's batch of one GPU; GRN, biases, norms and the mask token do not decay, and GRN is per "
    "image, as in the paper's Algorithm 1",
    origins={
        "decay": "choice of this program", "grn_scope": "paper Algorithm 1",
        **dict.fromkeys(("min_lr", "clip_grad", "ema_decay", "precision"), "official main_pretrain.py"),
    },
    lengths=dict.fromkeys((800, 1600), "paper Table 8"),
)  # fmt: skip
_PAPER = _SCRIPT.but(
    "paper Table 8",
    "random resized cropping is the only augmentation; Table 8 has 800 and 1600 epochs, both with this warm-up",
    origins={
        "img_size": "paper Appendix C",
        **dict.fromkeys(("mask_ratio", "norm_pix_loss", "decoder_depth", "decoder_embed_dim"), "paper section 3"),
    },
    epochs=1600, batch_size=4096, hflip=0.0,
)  # fmt: skip

PRETRAIN: dict[str, Recipe] = {
    "default": _SCRIPT,
    "paper": _PAPER,
    "paper-800": _PAPER.but("paper Table 8", _PAPER.note, epochs=800),
    "official": _SCRIPT.but(
        "official TRAINING.md and main_pretrain.py",
        "crops are mirrored too; weight decay takes GRN's gamma and beta and the mask token as well; one GRN norm over "
        "the whole batch of a process. The official double initialisation (deviation 0.88) is not reproduced",
        epochs=1600, batch_size=4096, decay="official", grn_scope="batch",
    ),
}  # fmt: skip

# ---- fine-tuning on ImageNet-1K ----

_FINETUNE = {
    "img_size": (224, 224), "min_lr": 1e-6, "betas": (0.9, 0.999), "clip_grad": None, "ema_decay": 0.9999,
    "batch_size": 1024, "layer_decay_kind": "single", "aa": "rand-m9-mstd0.5-inc1", "color_jitter": None,
    "reprob": 0.25, "hflip": 0.5, "crop_scale": 0.08, "mix_prob": 1.0, "switch_prob": 0.5, "head_init_scale": 1e-3,
    "precision": "float32",
}  # fmt: skip
# Of these the tables say nothing.
_UNSTATED = ("min_lr", "clip_grad", "color_jitter", "reprob", "hflip", "crop_scale", "mix_prob", "switch_prob")
_BY_SCRIPT = {
    **dict.fromkeys((*_UNSTATED, "precision"), "official main_finetune.py"),
    "aa": "RandAug (9, 0.5) of the table; inc1: official main_finetune.py",
    "img_size": "paper Table 14",
    "layer_decay_kind": "paper A.2",
}
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
    origins={"layer_decay_kind": "paper A.2"},
    blr=6.25e-4, epochs=100, warmup_epochs=20.0, layer_decay=0.6, layer_decay_kind="group", drop_path=0.1,
)  # fmt: skip
_LARGE = _BASE.but(
    "paper Table 11",
    "Table 11 gives base and large one learning rate, ten times the documented one (recipe convnextv2_large-paper)",
    assumed={"blr": "as for base"}, drop_path=0.2, blr=6.25e-4,
)  # fmt: skip
_HUGE = _BASE.but(
    "paper Table 11",
    "A.2 decays the learning rate layer by layer, and in groups for base and large alone",
    origins={"layer_decay_kind": "paper A.2"},
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

_SIZE_UNSTATED = "the tables of recipes name no image size; that their values hold at this one is assumed"
_FIRST_UNSTATED = "; at what size the step on ImageNet-22K was, is not stated for 512 px (section 5 names 384 px alone)"
# size: layer decay and drop path of Table 12, then epochs, layer decay, drop path and average of Table 13, then the
# image sizes of the last step in Table 15
_BY_22K = {
    "nano": (0.9, 0.0, 90, 0.9, 0.1, 0.9999, (224, 384)),
    "tiny": (0.9, 0.0, 90, 0.9, 0.1, 0.9999, (224, 384)),
    "base": (0.8, 0.1, 30, 0.8, 0.2, 0.9999, (224, 384)),
    "large": (0.8, 0.1, 30, 0.8, 0.3, 0.9999, (224, 384)),
    "huge": (0.8, 0.3, 30, 0.85, 0.5, None, (384, 512)),
}
for _size, (_decay, _drop, _epochs, _decay_1k, _drop_1k, _ema, _sides) in _BY_22K.items():
    _name = f"convnextv2_{_size}"
    _first = FINETUNE[_name].but(
        "paper Table 12 (intermediate fine-tuning on ImageNet-22K)",
        assumed={"img_size": "as no table gives that of this step"},
        blr=2.5e-4, batch_size=4096, epochs=90, warmup_epochs=5.0, layer_decay=_decay, ema_decay=None,
        weight_decay=0.05, drop_path=_drop, mixup=0.8, cutmix=1.0, smoothing=0.1,
    )  # fmt: skip
    _last = FINETUNE[_name].but(
        "paper Table 13 (ImageNet-1K after 22K)",
        assumed={} if 224 in _sides else {"img_size": "as Table 15 has huge at 384 and 512 px alone"},
        origins={"img_size": "paper Table 15"},
        blr=2.5e-5, batch_size=512, epochs=_epochs, warmup_epochs=0.0, layer_decay=_decay_1k, weight_decay=1e-8,
        mixup=0.0, cutmix=0.0, smoothing=0.1, drop_path=_drop_1k, ema_decay=_ema,
    )  # fmt: skip
    FINETUNE[f"{_name}-22k"] = _first
    FINETUNE[f"{_name}-22k-1k"] = _last
    FINETUNE[f"{_name}-22k-384"] = _first.but(
        _first.source, _SIZE_UNSTATED, origins={"img_size": "paper section 5"}, assumed={}, img_size=(384, 384)
    )
    for _side in _sides:
        if _side != 224:
            FINETUNE[f"{_name}-22k-1k-{_side}"] = _last.but(
                _last.source,
                _SIZE_UNSTATED + (_FIRST_UNSTATED if _side == 512 else ""),
                assumed={},
                origins={"img_size": "paper Table 15"},
                img_size=(_side, _side),
            )

# ---- supervised, from random weights ----

_V1 = "ConvNeXt V1 paper (arXiv 2201.03545)"
_V1_SCALE = "LayerScale begins at 1e-6"
_SUPERVISED = Recipe(
    f"{_V1} Table 5",
    {
        **_FINETUNE, "batch_size": 4096, "blr": 2.5e-4, "epochs": 300, "warmup_epochs": 20.0, "layer_decay": 1.0,
        "weight_decay": 0.05, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "head_init_scale": 1.0,
    },
    _V1_SCALE,
    origins={
        **dict.fromkeys((*_UNSTATED, "precision"), "official main.py of V1"),
        **dict.fromkeys(("clip_grad", "reprob"), f"{_V1} Table 5"),
        "aa": "randaugment (9, 0.5) of the table; inc1: official main.py of V1",
        "blr": f"{_V1} Table 5: 4e-3 at its batch of 4096",
        "layer_decay_kind": "without effect, as no learning rate decays",
    },
)  # fmt: skip
_SUPERVISED_22K = _SUPERVISED.but(
    f"{_V1} Table 5 (ImageNet-22K)", _V1_SCALE, epochs=90, warmup_epochs=5.0, ema_decay=None
)
_AFTER_22K = _SUPERVISED.but(
    f"{_V1} Table 6 (ImageNet-1K after 22K)",
    "",
    origins={
        **dict.fromkeys(("clip_grad", "reprob"), f"{_V1} Table 6"),
        "blr": f"{_V1} Table 6: 5e-5 at its batch of 512",
        "layer_decay_kind": f"{_V1} A.2",
    },
    batch_size=512, blr=2.5e-5, epochs=30, warmup_epochs=0.0, weight_decay=1e-8, mixup=0.0, cutmix=0.0,
    layer_decay=0.8, layer_decay_kind="group", head_init_scale=1e-3, ema_decay=None,
)  # fmt: skip
# size: drop path of Table 5 (on 1K, None where it is not trained on that alone; on 22K) and of Table 6
_BY_V1 = {
    "tiny": (0.1, 0.0, 0.0), "small": (0.4, 0.0, 0.1), "base": (0.5, 0.1, 0.2), "large": (0.5, 0.1, 0.3),
    "xlarge": (None, 0.2, 0.4),
}  # fmt: skip
for _size, (_drop_v1, _drop_22k, _drop_1k) in _BY_V1.items():
    _name = f"convnext_{_size}"
    if _drop_v1 is not None:
        FINETUNE[_name] = _SUPERVISED.but(_SUPERVISED.source, _V1_SCALE, drop_path=_drop_v1)
    FINETUNE[f"{_name}-22k"] = _SUPERVISED_22K.but(_SUPERVISED_22K.source, _V1_SCALE, drop_path=_drop_22k)
    FINETUNE[f"{_name}-22k-1k"] = _after = _AFTER_22K.but(
        _AFTER_22K.source, drop_path=_drop_1k, ema_decay=0.9999 if _size == "xlarge" else None
    )
    FINETUNE[f"{_name}-22k-1k-384"] = _after.but(_after.source, img_size=(384, 384))


def _all_assumed(like: str, note: str) -> Recipe:
    reason = f"as for {like}"
    return FINETUNE[like].but(f"assumed, {reason}", note, assumed=dict.fromkeys(FINETUNE[like].values, reason))


_NO_SUPERVISED = "neither paper states a supervised recipe of this size"
for _size in ("atto", "femto", "pico", "nano"):
    FINETUNE[f"convnext_{_size}"] = _all_assumed("convnext_tiny", f"{_NO_SUPERVISED}; {_V1_SCALE}")
FINETUNE["convnext_xlarge"] = _all_assumed("convnext_large", f"{_NO_SUPERVISED}; {_V1_SCALE}")
for _size in ("base", "large"):
    FINETUNE[f"convnext_{_size}-fcmae"] = FINETUNE[f"convnextv2_{_size}"].but(
        FINETUNE[f"convnextv2_{_size}"].source, f"V1 after FCMAE, as V2; {FINETUNE[f'convnextv2_{_size}'].note}"
    )
for _size in ("atto", "femto", "pico", "nano", "tiny", "base", "large"):
    FINETUNE[f"convnextv2_{_size}-supervised"] = _all_assumed(
        f"convnext_{_size if _size in _BY_V1 else 'tiny'}",
        "the paper does not state the recipe of its supervised V2 networks (Tables 3 and 14); this is that of V1",
    )

# ---- COCO and ADE20K ----


@dataclass(frozen=True)
class Transfer:
    """What the paper states of a transfer experiment: fixed values, and those that were swept, as tuples of all values
    that were tried; which of them was best is not stated."""

    source: str
    values: Mapping[str, Any]
    sweep: Mapping[str, tuple[float, ...]]
    unstated: str
    origins: Mapping[str, str] = field(default_factory=dict)


DOWNSTREAM: dict[str, Transfer] = {
    "coco": Transfer(
        "paper A.3",
        {
            "toolbox": "MMDetection", "method": "Mask R-CNN", "init": "final weights of ImageNet-1K pre-training",
            "optimizer": "AdamW", "lr": 1e-4, "weight_decay": 0.05, "batch_size": 32, "schedule": "3x", "epochs": 36,
            "augmentation": "large-scale jittering", "img_size": (1024, 1024), "scale_range": (0.1, 2.0),
            "test": "single scale, soft-NMS",
        },
        {"layer_decay": (0.9, 0.95), "drop_path": (0.2, 0.3, 0.4, 0.5)},
        "betas, warm-up, steps of the schedule",
        {"method": "paper section 6"},
    ),
    "ade20k": Transfer(
        "paper A.4",
        {
            "toolbox": "MMSegmentation", "method": "UPerNet",
            "init": "weights after supervised fine-tuning on ImageNet-1K", "optimizer": "AdamW", "weight_decay": 0.05,
            "batch_size": 16, "iterations": 160_000, "img_size": (512, 512), "img_size_huge_22k": (640, 640),
            "test_size": (512, 2048), "test_scales": (0.75, 0.875, 1.0, 1.125, 1.25),
        },
        {"layer_decay": (0.8, 0.9), "lr": (1e-4, 2e-4, 3e-4), "drop_path": (0.1, 0.2, 0.3, 0.4)},
        "betas, warm-up, learning rate schedule",
        {"method": "paper section 6", "img_size_huge_22k": "paper Table 7"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """The values of a run, and for each of them where it is from: a recipe's source, "assumed" or "given". ``former``:
    what earlier versions of this program resolved some of them to; a run that began with those keeps them."""

    recipe: str
    values: dict[str, Any]
    origins: dict[str, str]
    note: str = ""
    former: Mapping[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A table for the terminal: name, value, origin."""
        return _table({name: (self.values[name], origin) for name, origin in self.origins.items()}, self.note)

    def keeping(self, recorded: Mapping[str, Any]) -> "Resolved":
        """The same, with the former values of those whose former value is recorded."""
        kept = {name: value for name, value in self.former.items() if recorded.get(name) == value}
        origins = {**self.origins, **dict.fromkeys(kept, "this run's own, from an earlier version")}
        return Resolved(self.recipe, {**self.values, **kept}, origins, self.note)


def resolve(recipes: Mapping[str, Recipe], name: str, given: Mapping[str, Any]) -> Resolved:
    """Take a recipe's values, then what was given instead.

    Where the number of epochs is given but not the warm-up, the warm-up is the stated one for a number that a source
    states, and otherwise keeps its share of the epochs; a given ``lr`` replaces ``blr``.

    Raises:
        ValueError: no recipe of that name; the message lists them.
    """
    if name not in recipes:
        raise ValueError(f"--recipe must be one of {', '.join(recipes)}; got {name!r}")
    recipe = recipes[name]
    values, origins = dict(recipe.values), {key: recipe.origin(key) for key in recipe.values}
    former = {}
    for key, value in given.items():
        if key in values and value is not None:
            values[key], origins[key] = tuple(value) if isinstance(value, list) else value, "given"
    if values.get("ema_decay") == 0:
        values["ema_decay"] = None
    if given.get("lr") is not None:
        del values["blr"], origins["blr"]
        values["lr"], origins["lr"] = given["lr"], "given"
    epochs = given.get("epochs")
    if epochs is not None and given.get("warmup_epochs") is None:
        share = recipe.values["warmup_epochs"] / recipe.values["epochs"]
        values["warmup_epochs"] = share * epochs
        origins["warmup_epochs"] = f"{share:.1%} of the epochs, as in the recipe"
        if epochs in recipe.lengths:
            former = {"warmup_epochs": values["warmup_epochs"]}
            values["warmup_epochs"] = recipe.values["warmup_epochs"]
            origins["warmup_epochs"] = f"{recipe.lengths[epochs]}, for {epochs} epochs"
    return Resolved(name, values, origins, recipe.note, former)


TABLES: dict[str, Mapping[str, Recipe | Transfer]] = {
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "other toolboxes": DOWNSTREAM,
}


def overview() -> list[str]:
    """For the terminal: all recipes by what they are for, each with its source."""
    width = max(len(name) for table in TABLES.values() for name in table)
    return [
        line
        for title, table in TABLES.items()
        for line in (f"{title}:", *(f"  {name:<{width}}  {recipe.source}" for name, recipe in table.items()))
    ]


def described(name: str) -> list[str]:
    """For the terminal: every recipe of that name, with the origin of each value.

    Raises:
        ValueError: there is none.
    """
    found = [(title, table[name]) for title, table in TABLES.items() if name in table]
    if not found:
        names = dict.fromkeys(name for table in TABLES.values() for name in table)
        raise ValueError(f"--recipes must be names of recipes, which are {', '.join(names)}; got {name!r}")
    return [line for title, recipe in found for line in (f"{title}, {name}:", *_lines(recipe))]


def _lines(recipe: Recipe | Transfer) -> list[str]:
    if isinstance(recipe, Recipe):
        return _table({key: (value, recipe.origin(key)) for key, value in recipe.values.items()}, recipe.note)
    fixed = {key: (value, recipe.origins.get(key, recipe.source)) for key, value in recipe.values.items()}
    swept = {key: (values, f"{recipe.source}; swept, the best is not stated") for key, values in recipe.sweep.items()}
    return _table(fixed | swept, f"not stated: {recipe.unstated}")


def _table(rows: Mapping[str, tuple[Any, str]], note: str) -> list[str]:
    shown = {name: (_size(value) if "size" in name else _show(value)) for name, (value, _) in rows.items()}
    width, column = max(map(len, rows)), max(map(len, shown.values()))
    lines = [f"  {name:<{width}}  {shown[name]:<{column}}  {origin}" for name, (_, origin) in rows.items()]
    return [*lines, f"  ({note})"] if note else lines


def _size(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else _show(value)


def _show(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
