"""The weights that a run starts from or evaluates: read once, compared with the run, in the words of the command line.

Weight files record what their numbers mean: :func:`describe` writes it, :func:`compare` compares it with an evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._console import visible
from .._files import parse_json
from ..checkpoints import load_checkpoint
from ..checkpoints.formats import other_decoder, part_of
from ..checkpoints.state import (
    AVERAGED_WEIGHTS,
    State,
    architecture,
    count_blocks,
    is_v1,
    listing,
    read_checkpoint,
    read_state,
    require_consistent,
    unwrap,
)
from ..checkpoints.storage import CheckpointFile, read_checkpoint_file
from ..data.images import IMAGENET_MEAN, IMAGENET_STD
from ..data.value_range import range_text
from ..errors import UserError
from ..nn import GRNVariant
from ..sizes import block_of, size_of, size_text
from .checkpoint import list_checkpoints
from .config import RunConfig, TrainOptions

CHANNELS = 3
MAX_TEXT = 16 << 20  # of one metadatum: the names of ImageNet-22K's 21841 classes are a few hundred kilobytes
_LISTS = {"classes": str, "img_size": int, "mean": float, "std": float}
# What the settings of a checkpoint without a description of its weights tell as well.
_SETTINGS = ("grn", "img_size", "decoder")


def describe(run: RunConfig | TrainOptions, classes: Sequence[str] | None = None) -> dict[str, str]:
    """What the weights of a run tell about themselves, as text by name; lists are JSON.

    ``classes``: names of the head's classes, in its order.
    """
    about = {
        "model": run.model,
        "grn": run.grn,
        "img_size": json.dumps(run.img_size),
        "in_chans": str(CHANNELS),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
    }
    if scale := block_of(run.model).get("layer_scale"):
        about["layer_scale"] = str(scale)
    if classes is not None:
        about |= {"num_classes": str(len(classes)), "classes": json.dumps(list(classes))}
    if isinstance(run, RunConfig) and run.value_range is not None:
        about["value_range"] = range_text(run.value_range)
    for name, usual in (("encoding", "sparse"), ("decoder", "convnext")):
        if (value := getattr(run, name, usual)) != usual:
            about[name] = value
    return about


def compare(about: Mapping[str, str], run: Mapping[str, str], what: str, data: Path) -> list[str]:
    """Compare what weights record with an evaluation on ``data``, both as of :func:`describe`; return notes.

    Raises:
        UserError: the scores would mean nothing: other classes, or pixels normalised otherwise. It calls the weights
            ``what``.
    """
    notes, ours = [], _parsed(run, "classes", what)
    theirs = _parsed(about, "classes", what)
    if theirs is None:
        notes.append(
            f"{what} does not name its classes: they are taken to be the {len(ours)} subfolders of {data}, in the "
            "order of their names"
        )
    elif theirs != ours:
        raise UserError(f"{what} {_other_classes(theirs, ours, data)}.")
    for name in ("mean", "std"):
        before, now = _parsed(about, name, what), _parsed(run, name, what)
        if before is not None and before != now:
            raise UserError(f"{what} was trained on pixels normalised with {name} {before}, and {name} is {now} here.")
    before, now = _parsed(about, "img_size", what), _parsed(run, "img_size", what)
    if before is not None and before != now:
        notes.append(
            f"{what} was trained at {size_text(before)} pixels, and is evaluated at {size_text(now)} (--img-size)"
        )
    return notes


def _other_classes(theirs: list[str], ours: list[str], data: Path) -> str:
    both = set(theirs) & set(ours)
    there, here = [name for name in theirs if name not in both], [name for name in ours if name not in both]
    if not there and not here:
        number = next(n for n, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1])
        return (
            f"has the classes of {data} in another order: class {number} is {_quoted([theirs[number]])} there and "
            f"{_quoted([ours[number]])} here"
        )
    return f"was trained on other classes than those of {data}: " + ", and ".join(
        f"{_quoted(names)} only {where}" for names, where in ((there, "there"), (here, "here")) if names
    )


def _quoted(names: Iterable[str]) -> str:
    return listing(f"'{visible(name)}'" for name in names)


def _parsed(about: Mapping[str, str], name: str, what: str) -> list | None:
    """The value of a metadatum of :data:`_LISTS`, None where it is not told."""
    if name not in about:
        return None
    text, where = about[name], f"{name!r} in the metadata of {what}"
    if len(text) > MAX_TEXT:
        raise UserError(f"{where} is longer than {MAX_TEXT} characters, the most that is read of it.")
    try:
        value = parse_json(text.encode("utf-8", "surrogatepass"), where)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    kinds = (int, float) if _LISTS[name] is float else (_LISTS[name],)
    if not isinstance(value, list) or not all(type(item) in kinds for item in value):
        raise UserError(f"{where} must be a list of {_LISTS[name].__name__} as JSON, got {text[:80]!r}.")
    return value


@dataclass(frozen=True)
class Weights:
    """The content of ``--init``: ``state`` by canonical names, and what the file tells ``about`` it."""

    path: Path
    state: State
    about: Mapping[str, str]

    @property
    def what(self) -> str:
        """As messages call it."""
        return f"--init {self.path}"

    @property
    def parts(self) -> list[str]:
        """Of "encoder", "norm", "head" and "decoder" those that it holds."""
        return _parts(self.state.tensors)

    def require(self, model: str, grn: str, init_grn: str | None = None, may_change: bool = False) -> None:
        """Raise UserError unless these are weights of ``model`` with this GRN, for images of three channels.

        ``init_grn`` "drop": with a GRN, which is left out; "add": without one. ``may_change``: whether the command has
        the option for that."""
        found = architecture(self.state.tensors)
        if (name := size_of(*found, is_v1(self.state.tensors))) != model:
            this = name or "a network of depths {} and widths {}".format(*(", ".join(map(str, n)) for n in found))
            raise UserError(
                f"{self.what}: this is {this}, --model is {model}" + (f"; give --model {name}." if name else ".")
            )
        if (channels := self.state.tensors["downsample_layers.0.0.weight"].shape[1]) != CHANNELS:
            raise UserError(
                f"{self.what}: this is a network for images of {channels} channels, and images are read as "
                f"{CHANNELS} (RGB)."
            )
        wanted = str(GRNVariant.of(grn))
        try:
            stored = str(GRNVariant.of(self.about.get("grn", self._likely_grn(wanted, init_grn))))
        except ValueError as error:
            raise UserError(f"'grn' in the metadata of {self.what}: {error}.") from error
        if init_grn == "drop" and stored == "none":
            raise UserError(f"{self.what} was trained with --grn none, so --init-grn drop has no GRN to drop.")
        if init_grn == "add" and stored != "none":
            raise UserError(f"{self.what} was trained with --grn {stored}, so --init-grn add has none to add.")
        if init_grn is None and stored != wanted:
            advice = ""
            if may_change and wanted == "none":
                advice = "; --init-grn drop takes the rest of the weights"
            elif may_change and stored == "none":
                advice = "; --init-grn add takes the weights, with a new GRN"
            raise UserError(f"{self.what} was trained with --grn {stored}, and --grn is {wanted}{advice}.")

    def _likely_grn(self, wanted: str, init_grn: str | None) -> str:
        """The GRN of weights that do not tell: other programs' have the default. A run without GRN must not drop one
        unasked."""
        if wanted != "none" and init_grn is None:
            return wanted
        grn = [tensor for name, tensor in self.state.tensors.items() if ".grn." in name]
        return "default" if any(bool(tensor.any()) for tensor in grn) else "none"

    def require_head(self, num_classes: int | None = None, data: Path | None = None) -> None:
        """Raise UserError without a head, or where it has another number of outputs than ``data`` has classes."""
        if "head" not in self.parts:
            raise UserError(
                f"{self.what} has no head, so there is nothing to evaluate: train one with finetune --init "
                f"{self.path}, and evaluate its best.safetensors; or see analyze knn and analyze probe."
            )
        outputs = self.state.tensors["head.weight"].shape[0]
        if num_classes is not None and outputs != num_classes:
            raise UserError(f"{self.what} has a head of {outputs} classes, and {data} has {num_classes}.")

    def require_decoder(self, depth: int, width: int, kind: str = "convnext") -> None:
        """Raise UserError where the file has a decoder, but one of other sizes or another kind."""
        if "decoder" not in self.parts:
            return
        other = other_decoder(self.state.tensors)
        stored = "convnext" if other is None else self.about.get("decoder", "another kind")
        if stored != kind:
            raise UserError(
                f"{self.what} has a decoder of --decoder {stored}, and --decoder is {kind}; give that, or weights "
                "without a decoder."
            )
        if other is not None:
            return
        theirs = count_blocks(self.state.tensors, r"decoder\.(\d+)\."), self.state.tensors["proj.weight"].shape[0]
        if theirs != (depth, width):
            raise UserError(
                f"{self.what} has a decoder of --decoder-depth {theirs[0]} and --decoder-width {theirs[1]}, and they "
                f"are {depth} and {width}; give these, or weights without a decoder."
            )

    def load_into(self, model: nn.Module, skip_head: bool = False, init_grn: str | None = None) -> str:
        """Copy what ``model`` has a place for into it; return what was done, for the user. With ``init_grn`` the
        model, a classifier, keeps its own GRN, or has none."""
        try:
            weights = self.state.original if init_grn is None else self._around_grn_of(model)
            load_checkpoint(model, weights, skip_head=skip_head)
        except ValueError as error:
            sentence = getattr(error, "sentence", str(error))  # without advice for callers in Python
            raise UserError(f"{self.what}{sentence.removeprefix('path_or_state_dict')}") from error
        there, here = self.parts, _parts(read_state(model.state_dict(), "model").tensors)
        taken = [part for part in here if part in there and not (skip_head and part == "head")]
        text = f"{_and(taken)} of {self.path} ({self.state.format.name} names)"
        for words, parts in (("initial", here), ("left out", there)):
            rest = [part for part in parts if part not in taken]
            text += f"; {words}: {_and(rest)}" if rest else ""
        return text + {None: "", "drop": "; GRN dropped", "add": "; GRN initial"}[init_grn]

    def _around_grn_of(self, model: nn.Module) -> dict[str, Tensor]:
        """A classifier's weights by canonical names: these, but what is in GRN's place is the model's."""
        parts = ("stages", "downsample_layers", "norm", "head")
        taken = {n: t for n, t in self.state.tensors.items() if n.partition(".")[0] in parts and ".grn." not in n}
        own = read_state(model.state_dict(), "model").tensors
        return taken | {name: tensor for name, tensor in own.items() if ".grn." in name}


def read_weights(path: Path, use_ema: bool) -> Weights:
    """Read ``--init``; UserError where that is not the weights of a ConvNeXt."""
    what = f"--init {path}"
    try:
        file = read_checkpoint_file(path)
    except (OSError, ValueError) as error:
        if path.is_dir() and (checkpoints := list_checkpoints(path)):
            raise UserError(
                f"{what} is the folder of a run: give a file of it, such as {checkpoints[0][1]} or the weights "
                "exported at its end."
            ) from error
        raise UserError(f"--init {error}") from error
    if use_ema and not any(isinstance(file.content.get(name), Mapping) for name in AVERAGED_WEIGHTS):
        raise UserError(f"{what} has no averaged weights, which --ema asks for; runs with --ema-decay keep some.")
    try:
        state = read_checkpoint(unwrap(file.content, use_ema, what), what)
        require_consistent(state)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Weights(file.path, state, description(file))


def description(file: CheckpointFile) -> dict[str, str]:
    """What a file tells about its weights, as of :func:`describe`: an export in its metadata, a checkpoint of this
    program's training in ``task``, an older one in its settings; nothing if it is another program's."""
    if file.settings is not file.metadata:
        told = {name: file.settings[name] for name in _SETTINGS if name in file.settings}
        task = file.content.get("task")
        about = task.get("about") if isinstance(task, Mapping) else None
        told |= about if isinstance(about, Mapping) else {}
        return {str(name): text for name, value in told.items() if (text := _text(value)) is not None}
    told = dict(file.metadata)
    # Other programs may mean something else by these names.
    return told if {"model", "mean", "std"} <= told.keys() else {n: told[n] for n in ("grn",) if n in told}


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # of another program, which may keep anything there
        return None


def digest(model: nn.Module) -> str:
    """Which weights a run starts from: a path may hold others tomorrow, and a file that is written again may hold the
    same in other bytes."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256 {found.hexdigest()}"


def _parts(names: Iterable[str]) -> list[str]:
    found = {part_of(name).partition(".")[0] for name in names}
    return [{"stages": "encoder"}.get(part, part) for part in ("stages", "norm", "head", "decoder") if part in found]


def _and(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
