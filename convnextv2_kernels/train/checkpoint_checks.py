"""What a checkpoint of training must hold: every field is compared with the run that resumes before any of it is used.

PyTorch itself compares little: it keeps the values of a model where weights are missing, takes the hyperparameters of
the optimiser from the file, and runs over the end of moments that are smaller than their weight.
"""

from __future__ import annotations

import math
import random
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .._console import visible
from ..checkpoints.pickles import StandIn
from .config import RunConfig
from .optim import Average

FORMAT = 2
REQUIRED = ("format", "step", "epoch", "position", "config", "rng", "task", "model", "optimizer")
OPTIONAL = ("environment", "evaluation_pending")
MOMENTS = ("exp_avg", "exp_avg_sq")
_LAST_STEP = 1 << 24  # where AdamW's counter in float32 stops
_LONGEST_RNG = 1 << 13  # bytes of the state of PyTorch's generators, at most


class Spec(NamedTuple):
    """Shape, dtype and strides of a whole tensor; a stride means nothing where there is one element."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Of a plain tensor, or of one in shards as a whole."""
        strides = (stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        return cls(tuple(tensor.shape), tensor.dtype, tuple(strides))

    def __str__(self) -> str:
        return f"{_a(str(self.dtype).removeprefix('torch.'))} tensor {list(self.shape)}"


_COUNTER = Spec((), torch.float32, ())


@dataclass(frozen=True)
class Expected:
    """What checkpoints of a run hold: its settings; the tensors of its model; of each trained parameter the options
    that its settings give the optimiser; ``check_task``, which raises ValueError for the state of another task."""

    config: RunConfig
    tensors: Mapping[str, Spec]
    options: Mapping[str, Mapping[str, Any]]
    averaged: bool
    check_task: Callable[[Any, int], None]

    @classmethod
    def of(cls, task: Any, optimizer: torch.optim.Optimizer, average: Average | None) -> Expected:
        """Of a task whose model may be in shards: the shapes are those of whole tensors."""
        tensors = {name: Spec.of(tensor) for name, tensor in task.model.state_dict().items()}
        options = {name: group for group in named_groups(task.model, optimizer) for name in group["params"]}
        return cls(task.config, tensors, options, average is not None, task.check)


def named_groups(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimiser's groups with names in place of parameters."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def check_format(state: Any) -> None:
    """Raise ValueError where the content of a file is not that of a checkpoint of this program."""
    require(isinstance(state, dict), "the content", state, "a dict")
    if "format" not in state:
        raise ValueError("format is missing")
    require(type(state["format"]) is int and state["format"] == FORMAT, "format", state["format"], FORMAT)
    for name in REQUIRED:
        if name not in state:
            raise ValueError(f"{name} is missing")


def check_settings(state: dict[str, Any], config: RunConfig) -> None:
    """Raise ValueError where a checkpoint has unknown parts, or its settings are no settings of a run.

    Nothing is compared with ``config``: a sound checkpoint of other settings passes.
    """
    require_names("", state, REQUIRED, (*OPTIONAL, "model_ema"))
    check_config(state["config"], config)


def check_state(state: dict[str, Any], step: int, run: Expected) -> None:
    """Raise ValueError, in a sentence that names the field, what it holds and what was expected, where a checkpoint of
    ``step``, which has passed :func:`check_settings` and has the settings of the run, is none that the run could write.
    """
    _check_place(state, step, run.config)
    _check_environment(state.get("environment", {}))
    check_rng(state["rng"])
    run.check_task(state["task"], step)
    if not run.averaged and "model_ema" in state:
        raise ValueError("model_ema is there, expected none in a run without an average of its weights")
    _check_weights("model", state["model"], run.tensors)
    if run.averaged:
        require_names("", state, (*REQUIRED, "model_ema"), OPTIONAL)
        _check_weights("model_ema", state["model_ema"], run.tensors)
    _check_optimizer(state["optimizer"], state["step"], run)


def check_about(about: Any, own: Mapping[str, str]) -> None:
    """Raise ValueError where ``about`` is not what the weights of a run tell about themselves, which is ``own``;
    checkpoints may be older than some of it."""
    fits = isinstance(about, dict) and all(type(text) is str for pair in about.items() for text in pair)
    require(fits, "task.about", about, "texts by name")
    require_names("task.about", about, (), own)
    for name, text in about.items():
        require(text == own[name], f"task.about.{name}", text, own[name])


def require(fits: bool, field: str, found: Any, expected: Any) -> None:
    """Raise ValueError that a field is what was not expected, unless it fits."""
    if not fits:
        _refuse(field, found, expected)


def require_names(field: str, found: Mapping[Any, Any], names: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise ValueError where a mapping lacks one of ``names``, or has another that is not ``optional``."""
    names, prefix = dict.fromkeys(names), f"{field}." if field else ""
    for name in names:
        if name not in found:
            raise ValueError(f"{prefix}{visible(name)} is missing")
    known = names.keys() | set(optional)
    for name in found:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{prefix}{name_of(name)} is there, which no checkpoint of this run has")


def name_of(key: Any) -> str:
    """A key of a mapping, for a person."""
    return _short(key) if isinstance(key, str) else shown(key)


def shown(value: Any) -> str:
    """A value in a few words: short plain ones as they are, others by their type."""
    if isinstance(value, Tensor):
        return _shown_tensor(value)
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return f"'{_short(value)}'"
    if isinstance(value, (tuple, list)) and len(value) <= 4 and all(_is_plain(item) for item in value):
        items = ", ".join(map(shown, value))
        return f"({items})" if isinstance(value, tuple) else f"[{items}]"
    return _a(value.kind if isinstance(value, StandIn) else type(value).__name__)


def _shown_tensor(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    kind = "tensor" if type(tensor) is Tensor else type(tensor).__name__
    text = f"{_a(str(tensor.dtype).removeprefix('torch.'))} {kind} {list(tensor.shape)}"
    if tensor.layout != torch.strided:
        text += f" of layout {tensor.layout}"
    return text if tensor.device.type == "cpu" else f"{text} on device {tensor.device.type}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _short(text: str) -> str:
    return visible(text if len(text) <= 100 else f"{text[:100]}...")


def _a(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeio' else 'a'} {noun}"


def _refuse(field: str, found: Any, expected: Any) -> NoReturn:
    raise ValueError(
        f"{field} is {shown(found)}, expected {expected if isinstance(expected, str) else shown(expected)}"
    )


# -- settings


def check_config(saved: Any, current: RunConfig) -> None:
    """Raise ValueError where ``saved`` is not what :meth:`RunConfig.to_dict` returns for some settings of this kind.

    Fields that have a default may be missing: checkpoints may be older than them.
    """
    require(isinstance(saved, dict), "config", saved, "a dict")
    needed = [field.name for field in fields(current) if field.default is MISSING]
    require_names("config", saved, needed, [field.name for field in fields(current)])
    hints = get_type_hints(type(current))
    for name, value in saved.items():
        require(_matches(value, hints[name]), f"config.{name}", value, _in_words(hints[name]))


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value from a file, where tuples are lists, is of a type that a setting is annotated with."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is tuple:
        return (
            isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(_matches, value, arguments))
        )
    if hint is float:
        return type(value) in (int, float) and abs(value) <= 1e300
    if hint is int:
        return type(value) is int and abs(value) < 1 << 63
    if hint is type(None):
        return value is None
    return type(value) is hint if hint in (str, bool) else _is_plain(value)


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is tuple:
        return f"[{', '.join(map(_in_words, arguments))}]"
    words = {int: "an integer", float: "a finite number", str: "a text", bool: "True or False", type(None): "None"}
    return words.get(hint, str(hint))


# -- place, environment, random states


def _check_place(state: Mapping[str, Any], step: int, config: RunConfig) -> None:
    found = state["step"]
    require(type(found) is int and found == step, "step", found, f"{step}, the number in the name of the file")
    require(step <= config.total_steps, "step", found, f"at most the {config.total_steps} steps of the run")
    epoch, position = divmod(step, config.steps_per_epoch)
    of = f"of step {step} with {config.steps_per_epoch} steps an epoch"
    for name, wanted in (("epoch", epoch), ("position", position)):
        require(type(state[name]) is int and state[name] == wanted, name, state[name], f"{wanted}, that {of}")
    pending = state.get("evaluation_pending", False)
    fits = type(pending) is bool and (not pending or position == 0)
    require(fits, "evaluation_pending", pending, "True or False" if position == 0 else "False within an epoch")


def _check_environment(found: Any) -> None:
    require(isinstance(found, dict), "environment", found, "a dict")
    for name, value in found.items():
        require(isinstance(name, str), f"environment.{name_of(name)}", name, "a name")
        plain = _is_plain(value) and (type(value) is not int or value.bit_length() <= 64)
        require(plain, f"environment.{name_of(name)}", value, "a text or a number")


def check_rng(found: Any) -> None:
    """Raise ValueError where ``found`` is not what :func:`.checkpoint.rng_state` returns."""
    require(isinstance(found, dict), "rng", found, "a dict")
    require_names("rng", found, ("torch", "python"), ("cuda",))
    _check_generator("rng.torch", found["torch"], "cpu")
    if "cuda" in found:
        _check_generator("rng.cuda", found["cuda"], "cuda")
    wanted = "the state of Python's random.Random: (3, 625 integers of 32 bits, None or a number)"
    state = found["python"]
    require(isinstance(state, (tuple, list)) and len(state) == 3, "rng.python", state, wanted)
    version, internal, gauss = state
    sound = (
        type(version) is int
        and version == 3
        and isinstance(internal, (tuple, list))
        and len(internal) == 625
        and all(type(word) is int and 0 <= word < 1 << 32 for word in internal)
        and (gauss is None or (type(gauss) is float and math.isfinite(gauss)))
    )
    require(sound, "rng.python", state, wanted)
    try:
        random.Random().setstate((version, tuple(internal), gauss))
    except ValueError as error:
        raise ValueError(f"rng.python is {error}, expected {wanted}") from error


def _check_generator(field: str, found: Any, device: str) -> None:
    wanted = "the state of a generator of random numbers, bytes in a uint8 tensor"
    plain = type(found) is Tensor and found.layout == torch.strided and found.device.type == "cpu"
    plain = plain and found.dtype == torch.uint8 and found.dim() == 1 and found.is_contiguous()
    require(plain and found.numel() <= _LONGEST_RNG, field, found, wanted)
    if device == "cpu" or torch.cuda.is_available():
        try:
            torch.Generator(device).set_state(found)
        except RuntimeError as error:
            raise ValueError(f"{field} is {shown(found)} that is refused ({error}), expected {wanted}") from error


# -- tensors


def _check_weights(field: str, found: Any, tensors: Mapping[str, Spec]) -> None:
    require(isinstance(found, dict), field, found, "a dict")
    require_names(field, found, tensors)
    for name, spec in tensors.items():
        _check_tensor(f"{field}.{name}", found[name], spec)


def _check_tensor(field: str, found: Any, spec: Spec) -> None:
    """A plain tensor on the CPU whose elements are its own and finite."""
    plain = type(found) is Tensor and not found.is_nested and found.layout == torch.strided
    plain = plain and found.device.type == "cpu" and not found.is_neg()
    require(plain and Spec.of(found)[:2] == spec[:2], field, found, str(spec))
    if _overlaps(found):
        raise ValueError(
            f"{field} is {shown(found)} of strides {list(found.stride())}, in which elements share memory, expected "
            f"{spec} with memory for each"
        )
    if not torch.isfinite(found).all():
        raise ValueError(f"{field} is {shown(found)} with elements that are not finite, expected finite ones")


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory: never so for a tensor whose strides, in order, step over what lies below."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


# -- the optimiser


def _check_optimizer(found: Any, step: int, run: Expected) -> None:
    require(isinstance(found, dict), "optimizer", found, "a dict")
    require_names("optimizer", found, ("state", "param_groups"))
    _check_groups(found["param_groups"], run.options)
    entries, owners = found["state"], {}
    require(isinstance(entries, dict), "optimizer.state", entries, "a dict")
    require_names("optimizer.state", entries, run.options)
    for name in run.options:
        field, entry = f"optimizer.state.{name}", entries[name]
        require(isinstance(entry, dict), field, entry, "a dict")
        require_names(field, entry, ("step", *MOMENTS))
        _check_tensor(f"{field}.step", entry["step"], _COUNTER)
        counted = entry["step"].item()
        if counted != min(step, _LAST_STEP):
            raise ValueError(f"{field}.step is {counted:g}, expected {step}")
        for moment in MOMENTS:
            _check_tensor(f"{field}.{moment}", entry[moment], run.tensors[name])
            # The optimiser walks through the memory of a weight and of its moments in step.
            strides = run.tensors[name].strides
            if Spec.of(entry[moment]).strides != strides:
                raise ValueError(
                    f"{field}.{moment} has strides {list(entry[moment].stride())}, expected {list(strides)}"
                )
        if entry["exp_avg_sq"].numel() and entry["exp_avg_sq"].min() < 0:
            raise ValueError(f"{field}.exp_avg_sq has elements below 0, expected an average of squares")
        # The optimiser takes these tensors as they are: two that share memory would be updated as one.
        for part, tensor in entry.items():
            other = owners.setdefault(tensor.untyped_storage().data_ptr(), f"{field}.{part}")
            if tensor.numel() and other != f"{field}.{part}":
                raise ValueError(f"{field}.{part} shares its memory with {other}, expected memory of its own")


def _check_groups(groups: Any, options: Mapping[str, Mapping[str, Any]]) -> None:
    field = "optimizer.param_groups"
    require(isinstance(groups, list), field, groups, "a list")
    seen: set[str] = set()
    for i, group in enumerate(groups):
        field = f"optimizer.param_groups[{i}]"
        require(isinstance(group, dict), field, group, "a dict")
        names = group.get("params")
        require(isinstance(names, list) and bool(names), f"{field}.params", names, "a list of names")
        for name in names:
            known = isinstance(name, str) and name in options
            require(known, f"{field}.params", name, "names of trained parameters alone")
            if name in seen:
                raise ValueError(f"{field}.params has {name}, which is in a group already")
            seen.add(name)
            _check_options(field, group, options[name])
    for name in options:
        if name not in seen:
            raise ValueError(f"optimizer.param_groups is missing {name}")


def _check_options(field: str, group: Mapping[Any, Any], options: Mapping[str, Any]) -> None:
    """The options of a group are those that the settings of the run give. An option that this PyTorch does not know, or
    the one that wrote the file did not, passes where it is off. The learning rate is set anew in every step."""
    for key in [*options, *(key for key in group if key not in options)]:
        if key == "params":
            continue
        name = f"{field}.{name_of(key)}"
        found, wanted = group.get(key), options.get(key)
        if key in group and key in options:
            require(
                _is_rate(found) if key == "lr" else _same(found, wanted),
                name,
                found,
                "a finite rate of at least 0" if key == "lr" else wanted,
            )
        elif key in group:
            if not (isinstance(key, str) and (found is None or found is False)):
                raise ValueError(f"{name} is {shown(found)}, which the settings of this run do not give")
        elif wanted is not None and wanted is not False:
            raise ValueError(f"{name} is missing, expected {shown(wanted)}")


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _same(found: Any, wanted: Any) -> bool:
    """Numbers are compared up to the last digits of a power, which differ between machines. PyTorch makes a list of
    ``betas`` where an optimiser was restored."""
    if isinstance(wanted, (tuple, list)):
        return isinstance(found, (tuple, list)) and len(found) == len(wanted) and all(map(_same, found, wanted))
    if type(wanted) is float:
        return type(found) in (int, float) and math.isclose(found, wanted, rel_tol=1e-9)
    return type(found) is type(wanted) and found == wanted
