"""Training checkpoints damaged one field at a time: what is done to the content, and the words that must answer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

PASSED_OVER, REFUSED, SAME = "passed over", "refused", "resumed to the same losses"


class Damage(NamedTuple):
    """``apply`` changes the content of a checkpoint after step 6, or returns another. ``says`` names the field in the
    sentence, ``also`` is another part of it; ``outcome`` is what becomes of the run."""

    apply: Callable[[dict], Any]
    says: str
    outcome: str = PASSED_OVER
    also: str = ""


HUGE = 10**300  # of a few hundred bits, which files may hold
ONE = torch.ones
BIAS, CONV, TOKEN = "encoder.stages.3.0.pwconv1.bias", "encoder.stages.0.0.dwconv.weight", "mask_token"
PROJ = "encoder.stages.3.0.pwconv1.weight"


def put(*path: Any, to: Any) -> Callable[[dict], None]:
    """Set the item at the end of ``path``."""

    def apply(state: dict) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = to

    return apply


def drop(*path: Any) -> Callable[[dict], None]:
    """Delete the item at the end of ``path``."""

    def apply(state: dict) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return apply


def change(*path: Any, by: Callable[[Any], Any]) -> Callable[[dict], None]:
    """Replace the item at the end of ``path`` by a function of it."""

    def apply(state: dict) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = by(state[path[-1]])

    return apply


def without_stage_3(state: dict) -> None:
    state["model"] = {name: tensor for name, tensor in state["model"].items() if ".stages.3." not in name}


def one_storage(state: dict) -> None:
    entry = state["optimizer"]["state"][CONV]
    entry["exp_avg_sq"] = entry["exp_avg"] = entry["exp_avg"].abs()


def two_parameters_share(state: dict) -> None:
    moments = state["optimizer"]["state"]
    moments[BIAS]["exp_avg"] = moments["encoder.stages.2.0.pwconv1.bias"]["exp_avg"]


def moved(state: dict) -> None:
    """A weight into the group that does not decay."""
    decayed, undecayed = (group["params"] for group in state["optimizer"]["param_groups"])
    undecayed.append(decayed.pop())


def first_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return apply


def overlapping(tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_strided(torch.ones(2 * tensor.numel()), tensor.shape, [1] * tensor.dim())


TENSOR_FAULTS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "None": (lambda t: None, "None, expected a float32 tensor ["),
    "a list": (lambda t: t.tolist(), "a list, expected a float32 tensor ["),
    "a number": (lambda t: 1.5, "1.5, expected a float32 tensor ["),
    "larger": (lambda t: torch.zeros(4096), "a float32 tensor [4096], expected"),
    "smaller": (lambda t: t.reshape(-1)[:1].clone(), "a float32 tensor [1], expected"),
    "empty": (lambda t: torch.zeros(0), "a float32 tensor [0], expected"),
    "a scalar": (lambda t: torch.tensor(1.0), "a float32 tensor [], expected"),
    "one axis more": (lambda t: t.unsqueeze(0).clone(), "a float32 tensor [1, "),
    "float64": (lambda t: t.double(), "a float64 tensor"),
    "float16": (lambda t: t.half(), "a float16 tensor"),
    "int64": (lambda t: t.long(), "an int64 tensor"),
    "bool": (lambda t: t > 0, "a bool tensor"),
    "complex": (lambda t: t.to(torch.complex64), "a complex64 tensor"),
    "a parameter": (lambda t: torch.nn.Parameter(t.clone()), "a float32 Parameter"),
    "stride 0": (lambda t: torch.ones(1).expand(t.shape), "share memory"),
    "overlapping": (overlapping, "share memory"),
    "sparse": (lambda t: t.to_sparse(), "of layout torch.sparse_coo"),
    "nan": (first_value(math.nan), "not finite"),
    "inf": (first_value(math.inf), "not finite"),
    "meta": (lambda t: t.to("meta"), ""),
    "nested": (lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()]), ""),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), ""),
}


def tensor_damages() -> dict[str, Damage]:
    """Every fault of a tensor, in the weights, their average and the optimiser's moments."""
    places = {
        f"model.{CONV}": ("model", CONV),
        f"model_ema.{PROJ}": ("model_ema", PROJ),
        f"optimizer.state.{PROJ}.exp_avg": ("optimizer", "state", PROJ, "exp_avg"),
        f"optimizer.state.{CONV}.exp_avg_sq": ("optimizer", "state", CONV, "exp_avg_sq"),
    }
    return {
        f"{field}: {name}": Damage(change(*path, by=by), f"{field} is ", also=says)
        for field, path in places.items()
        for name, (by, says) in TENSOR_FAULTS.items()
    }


def option(key: str, value: Any, says: str, group: int = 0) -> Damage:
    """A hyperparameter of the optimiser."""
    field = f"optimizer.param_groups[{group}].{key}"
    return Damage(put("optimizer", "param_groups", group, key, to=value), f"{field} is {says}")


DAMAGES: dict[str, Damage] = {
    # the whole
    "a list": Damage(lambda state: [state], "expected a dict"),
    "a tensor": Damage(lambda state: torch.ones(3), "expected a dict"),
    "nothing": Damage(lambda state: None, "expected a dict"),
    **{
        f"no {key}": Damage(drop(key), f"{key} is missing")
        for key in ("step", "model", "model_ema", "optimizer", "epoch", "position", "rng", "config", "task")
    },
    "no format": Damage(drop("format"), "format"),
    "no environment": Damage(drop("environment"), "", SAME),
    "another key": Damage(put("more", to=1), "more"),
    "a number as key": Damage(put(5, to=1), "5"),
    "a tensor as key": Damage(put(torch.ones(2), to=1), "a float32 tensor [2]"),
    **{f"format {v!r}": Damage(put("format", to=v), "format is") for v in (1, 3, "2", 2.0, None, torch.tensor(2))},
    # the place
    **{
        f"step {str(v)[:20]}": Damage(put("step", to=v), "step is")
        for v in (-1, 0, 5, 7, 13, 10**9, 10**30, HUGE, "6", True, 6.0, math.nan, None, torch.tensor(6), [6])
    },
    **{
        f"epoch {str(v)[:20]}": Damage(put("epoch", to=v), "epoch is")
        for v in (-1, 0, 2, 10**9, HUGE, "1", True, 1.0, None, torch.tensor(1))
    },
    **{
        f"position {str(v)[:20]}": Damage(put("position", to=v), "position is")
        for v in (-1, 0, 3, 4, HUGE, "2", 2.0, None, torch.tensor(2))
    },
    # weights
    "all of stage 3 missing": Damage(without_stage_3, "model.encoder.stages.3."),
    "no weights": Damage(put("model", to={}), "model."),
    "weights in a list": Damage(change("model", by=lambda m: list(m.items())), "model is a list"),
    "one weight missing": Damage(drop("model", BIAS), f"model.{BIAS} is missing"),
    "one averaged weight missing": Damage(drop("model_ema", BIAS), f"model_ema.{BIAS} is missing"),
    "averages in a list": Damage(change("model_ema", by=lambda m: list(m.items())), "model_ema is a list"),
    "one weight more": Damage(put("model", "extra.weight", to=ONE(3)), "model.extra.weight"),
    "one average more": Damage(put("model_ema", "extra.weight", to=ONE(3)), "model_ema.extra.weight"),
    "a weight called 3": Damage(put("model", 3, to=ONE(3)), "model.3"),
    "a weight with a name that no terminal shows": Damage(put("model", "\x1b[2J\udc80", to=ONE(3)), r"\x1b[2J\udc80"),
    # the optimiser
    "an empty optimiser": Damage(put("optimizer", to={}), "optimizer.state is missing"),
    "an optimiser in a list": Damage(put("optimizer", to=[]), "optimizer is []"),
    "no state of the optimiser": Damage(drop("optimizer", "state"), "optimizer.state is missing"),
    "no groups": Damage(drop("optimizer", "param_groups"), "optimizer.param_groups is missing"),
    "more of the optimiser": Damage(put("optimizer", "more", to=1), "optimizer.more"),
    "state in a list": Damage(put("optimizer", "state", to=[]), "optimizer.state is []"),
    "empty state": Damage(put("optimizer", "state", to={}), "optimizer.state."),
    "state by number": Damage(
        change("optimizer", "state", by=lambda s: dict(enumerate(s.values()))), "optimizer.state."
    ),
    "no moments of a weight": Damage(drop("optimizer", "state", CONV), f"optimizer.state.{CONV} is missing"),
    "moments of another weight": Damage(put("optimizer", "state", "extra", to={}), "optimizer.state.extra"),
    "moments that are none": Damage(put("optimizer", "state", CONV, to=None), f"optimizer.state.{CONV} is None"),
    **{
        f"no {key} of a weight": Damage(
            drop("optimizer", "state", CONV, key), f"optimizer.state.{CONV}.{key} is missing"
        )
        for key in ("step", "exp_avg", "exp_avg_sq")
    },
    "a moment more": Damage(
        put("optimizer", "state", CONV, "max_exp_avg_sq", to=ONE(8, 1, 7, 7)), f"optimizer.state.{CONV}.max_exp_avg_sq"
    ),
    "a square below 0": Damage(
        change("optimizer", "state", CONV, "exp_avg_sq", by=first_value(-1.0)), f"optimizer.state.{CONV}.exp_avg_sq"
    ),
    "both moments in one place": Damage(one_storage, f"optimizer.state.{CONV}.exp_avg"),
    "two weights with one moment": Damage(two_parameters_share, ".exp_avg"),
    **{
        f"step of a weight {v!r}": Damage(
            put("optimizer", "state", TOKEN, "step", to=v), f"optimizer.state.{TOKEN}.step is"
        )
        for v in (
            torch.tensor(5.0), torch.tensor(-6.0), torch.tensor(1e9), torch.tensor(math.nan), torch.tensor([6.0]),
            torch.tensor(6), torch.tensor(6.0, dtype=torch.float64), 6.0, 6, "6", None,
        )
    },
    "groups in a dict": Damage(put("optimizer", "param_groups", to={}), "optimizer.param_groups is a dict"),
    "no group": Damage(put("optimizer", "param_groups", to=[]), "param_groups"),
    "a group less": Damage(drop("optimizer", "param_groups", 1), "param_groups"),
    "a group more": Damage(
        change("optimizer", "param_groups", by=lambda g: [*g, {**g[0], "params": []}]), "param_groups"
    ),
    "a group twice": Damage(change("optimizer", "param_groups", by=lambda g: [*g, g[0]]), "param_groups"),
    "a group in a list": Damage(put("optimizer", "param_groups", 0, to=[]), "optimizer.param_groups[0] is []"),
    "betas": option("betas", (0.5, 0.95), "(0.5, 0.95), expected (0.9, 0.95)"),
    "betas that are none": option("betas", None, "None"),
    "betas of tensors": option("betas", (torch.tensor(0.9), torch.tensor(0.95)), "a tuple"),
    "beta of 1": option("betas", (0.9, 1.0), "(0.9, 1.0)"),
    "eps": option("eps", 0.1, "0.1"),
    "eps nan": option("eps", math.nan, "nan"),
    "decay": option("weight_decay", 0.5, "0.5, expected 0.05"),
    "decay of the undecayed": option("weight_decay", 0.5, "0.5, expected 0.0", group=1),
    "decay in a tensor": option("weight_decay", torch.tensor(0.05), "a float32 tensor"),
    "maximize": option("maximize", True, "True, expected False"),
    "amsgrad": option("amsgrad", True, "True, expected False"),
    "capturable": option("capturable", True, "True, expected False"),
    "differentiable": option("differentiable", True, "True, expected False"),
    "coupled decay": option("decoupled_weight_decay", False, "False, expected True"),
    "not fused": option("fused", False, "False, expected True"),
    "foreach": option("foreach", True, "True, expected None"),
    "maximize 0": option("maximize", 0, "0, expected False"),
    "rate in a tensor": option("lr", torch.tensor(0.1), "a float32 tensor"),
    "rate nan": option("lr", math.nan, "nan"),
    "rate below 0": option("lr", -1.0, "-1.0"),
    "rate of text": option("lr", "fast", "'fast'"),
    "another rate, which every step sets": Damage(put("optimizer", "param_groups", 0, "lr", to=0.75), "", SAME),
    "no rate": Damage(drop("optimizer", "param_groups", 0, "lr"), "optimizer.param_groups[0].lr is missing"),
    "no betas": Damage(drop("optimizer", "param_groups", 0, "betas"), "optimizer.param_groups[0].betas is missing"),
    "a scale of the rate": option("lr_scale", 0.5, "0.5"),
    "another option": option("more", 1, "1"),
    "no parameters": Damage(drop("optimizer", "param_groups", 0, "params"), "optimizer.param_groups[0].params is"),
    "a parameter less": Damage(lambda s: s["optimizer"]["param_groups"][0]["params"].pop() and None, "is missing"),
    "a parameter twice": Damage(lambda s: s["optimizer"]["param_groups"][0]["params"].append(CONV), CONV),
    "a parameter in the other group": Damage(moved, "optimizer.param_groups[1]"),
    "an unknown parameter": Damage(lambda s: s["optimizer"]["param_groups"][0]["params"].append("x"), "x"),
    "a parameter that is a list": Damage(
        lambda s: s["optimizer"]["param_groups"][0]["params"].append([]), "optimizer.param_groups[0].params is []"
    ),
    "parameters by number": Damage(
        change("optimizer", "param_groups", 0, "params", by=lambda p: list(range(len(p)))), "params"
    ),
    # random states
    "no random states": Damage(put("rng", to=None), "rng is None"),
    "empty random states": Damage(put("rng", to={}), "rng."),
    "more random states": Damage(put("rng", "more", to=1), "rng.more"),
    **{
        f"rng.torch {i}": Damage(put("rng", "torch", to=v), "rng.torch is")
        for i, v in enumerate(
            (None, [1], torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), torch.zeros(5056, dtype=torch.uint8),
             torch.zeros(2, 2528, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8).expand(5056))
        )
    },
    **{
        f"rng.python {i}": Damage(put("rng", "python", to=v), "rng.python is")
        for i, v in enumerate(
            (None, (3,), (99, (1,) * 625, None), (3, (1,) * 624, None), (3, ("a",) * 625, None), (3, (-1,) * 625, None),
             (3, (1,) * 624 + (10**6,), None), (3, (1,) * 624 + (HUGE,), None), (3, (1,) * 625, "a"), (3, 5, None), 5,
             (3, (True,) * 625, None), (2, (1,) * 625, None), (3, (1,) * 625, torch.ones(1)))
        )
    },
    **{
        f"rng.cuda {i}": Damage(put("rng", "cuda", to=v), "rng.cuda is")
        for i, v in enumerate((5, torch.ones(3), torch.zeros(2, 8, dtype=torch.uint8)))
    },
    # the task
    "a task of None": Damage(put("task", to=None), "task is None"),
    "a task in a list": Damage(put("task", to=[]), "task is []"),
    "a task that remembers": Damage(put("task", to={"best": {}}), "task.best"),
    # settings
    "no settings": Damage(put("config", to=None), "config is None"),
    "settings in a list": Damage(put("config", to=[]), "config is []"),
    "a setting less": Damage(drop("config", "lr"), "config.lr is missing"),
    "a setting less that has a default": Damage(drop("config", "encoding"), "", SAME),
    "a setting more": Damage(put("config", "more", to=1), "config.more"),
    "a setting by number": Damage(put("config", 1, to=1), "config.1"),
    "a setting in a tensor": Damage(put("config", "epochs", to=torch.ones(3)), "config.epochs is a float32 tensor [3]"),
    "a huge setting": Damage(put("config", "epochs", to=HUGE), "config.epochs is"),
    "a setting beyond what is read": Damage(put("config", "epochs", to=10**5000), "not a readable checkpoint"),
    "a setting of text": Damage(put("config", "epochs", to="3"), "config.epochs is '3'"),
    "a setting of True": Damage(put("config", "decoder_depth", to=True), "config.decoder_depth is True"),
    "a setting in a dict": Damage(put("config", "img_size", to={"a": 1}), "config.img_size is a dict"),
    "betas of text": Damage(put("config", "betas", to=["a", "b"]), "config.betas is"),
    "a setting that is a number for text": Damage(put("config", "model", to=5), "config.model is 5"),
    "another seed": Damage(put("config", "seed", to=8), "seed: 8 in the checkpoint, 7 now", REFUSED),
    "another rate of settings": Damage(put("config", "lr", to=0.5), "lr: 0.5 in the checkpoint", REFUSED),
    "a rate that is nan": Damage(put("config", "lr", to=math.nan), "config.lr is nan"),
    "other images": Damage(put("config", "images_sha256", to="0"), "images", REFUSED),
    "a model that no terminal shows": Damage(
        put("config", "model", to="\x1b[2J\udc80"), r"model: \x1b[2J\udc80 in the checkpoint", REFUSED
    ),
    # the environment
    "environment None": Damage(put("environment", to=None), "environment is None"),
    "environment in a list": Damage(put("environment", to=["a"]), "environment is ['a']"),
    "a tensor in the environment": Damage(put("environment", "threads", to=ONE(3)), "environment.threads is a float32"),
    "a dict in the environment": Damage(put("environment", "threads", to={}), "environment.threads is a dict"),
    "a huge number in the environment": Damage(put("environment", "threads", to=HUGE), "environment.threads is"),
    "a number as name in the environment": Damage(put("environment", 4, to=1), "environment.4"),
    "control characters in the environment": Damage(
        put("environment", "torch", to="\x1b[2J\udc80"), r"torch was \x1b[2J\udc80 and is", SAME
    ),
}  # fmt: skip
