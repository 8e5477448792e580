"""Checkpoints of training that were edited, cut or replaced: each is passed over for an older one, or refused, with a
sentence that names the field; or the run goes on with bitwise the right losses."""

import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.pictures import class_folder, nested_folder
from helpers.training import CONFIG, losses, run_tiny, tiny_model
from train.two_processes import join, needs_gloo, spawn

from convnextv2_kernels._files import remove_abandoned
from convnextv2_kernels.cli import main
from convnextv2_kernels.data.images import CropDataset
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.train import checkpoint, trainer
from convnextv2_kernels.train.checkpoint_checks import Expected, check_format, check_settings, check_state
from convnextv2_kernels.train.config import require_same_config
from convnextv2_kernels.train.distributed import processes
from convnextv2_kernels.train.finetune import check_best
from convnextv2_kernels.train.optim import make_optimizer, parameter_groups
from convnextv2_kernels.train.pretrain import PretrainTask
from convnextv2_kernels.train.setup import write_settings
from convnextv2_kernels.train.trainer import Spread, Storage, Trainer

from .damages import DAMAGES, PASSED_OVER, PROJ, REFUSED, drop, put, tensor_damages, without_stage_3

# what the reader of files refuses before it is content
UNREAD = ("a setting beyond what is read",)
OLDER, NEWEST = "checkpoint-4.pt", "checkpoint-6.pt"


@pytest.fixture(scope="module")
def original(tmp_path_factory, photos) -> Path:
    """A run that stopped after six steps: checkpoints of four and six, and the pictures beside it."""
    folder = tmp_path_factory.mktemp("run")
    train_to(6, folder, photos)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return sorted(nested_folder(tmp_path_factory.mktemp("photos")).rglob("*.png"))


@pytest.fixture(scope="module")
def content(original) -> dict:
    return torch.load(original / NEWEST, weights_only=True)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """The run's folder, whose newest checkpoint a test may replace."""
    for name in (OLDER, NEWEST, "log.jsonl"):
        shutil.copy(original / name, tmp_path / name)
    return tmp_path


def train_to(steps: int, output: Path, photos: list[Path]) -> None:
    torch.set_num_threads(1)
    run_tiny(output, photos, max_steps=steps, save_every=2, ema_decay=0.9)


def replace(folder: Path, content: object) -> None:
    (folder / NEWEST).unlink(missing_ok=True)
    torch.save(content, folder / NEWEST)


def resumed(folder: Path) -> tuple[Trainer, list[str]]:
    """A run that has resumed, and what it said."""
    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    said: list[str] = []
    task = PretrainTask(tiny_model(seed=1), CropDataset([], config.img_size, config.seed), config)
    run = Trainer(task, Storage(folder), Spread(), said.append)
    run.resume()
    return run, said


def everything(run: Trainer) -> dict[str, object]:
    """What the losses to come depend on."""
    return {"step": run.outcome.step, **checkpoint.gather_state(run.task.model, run.optimizer, run.average)}


def equal(a: object, b: object) -> bool:
    """Whether nested containers of tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def sound(original, tmp_path_factory) -> dict[str, dict]:
    """What a run restores from the untouched checkpoints, by name."""
    found = {}
    for name in (OLDER, NEWEST):
        folder = tmp_path_factory.mktemp("sound")
        shutil.copy(original / name, folder)
        found[name] = everything(resumed(folder)[0])
    return found


CASES = {**DAMAGES, **tensor_damages()}
# PyTorch's own, of nested and quantized tensors
of_old_tensors = pytest.mark.filterwarnings("ignore::UserWarning")


def damaged(content: dict, name: str) -> object:
    """A copy with one field damaged."""
    content = containers(content)
    other = CASES[name].apply(content)
    return content if other is None and name != "nothing" else other


def containers(value: object) -> object:
    """A copy in which tensors are the same."""
    if isinstance(value, dict):
        return {key: containers(item) for key, item in value.items()}
    return [containers(item) for item in value] if isinstance(value, list) else value


def require_sentence(name: str, said: str, *parts: str) -> None:
    damage = CASES[name]
    assert all(part in said for part in parts or (damage.says, damage.also)), said
    assert "\x1b" not in said and "\udc80" not in said and len(said) < 500
    if damage.outcome == PASSED_OVER:
        assert said.startswith("warning: ") and NEWEST in said and said.endswith("; it is passed over")
        assert "\n" not in said


@of_old_tensors
@pytest.mark.parametrize("name", [name for name in CASES if name not in UNREAD])
def test_a_damaged_field_is_named_and_nothing_of_it_is_restored(name, folder, content, monkeypatch):
    contents = {OLDER: {**content, "step": 4, "epoch": 1, "position": 0}, NEWEST: damaged(content, name)}
    contents[OLDER]["optimizer"] = four_steps(content["optimizer"])
    restored = []
    monkeypatch.setattr(checkpoint, "load_torch", lambda path: contents[path.name])
    monkeypatch.setattr(trainer, "restore_state", lambda *arguments: restored.append(arguments[3]))
    if CASES[name].outcome == REFUSED:
        with pytest.raises(UserError) as refused:
            resumed(folder)
        said = str(refused.value)
        assert restored == []
    else:
        said = "\n".join(resumed(folder)[1])
        assert restored[0] is contents[OLDER if CASES[name].outcome == PASSED_OVER else NEWEST]
    require_sentence(name, said)


def four_steps(optimizer: dict) -> dict:
    optimizer = containers(optimizer)
    for entry in optimizer["state"].values():
        entry["step"] = torch.tensor(4.0)
    return optimizer


# one of each part, and what is said as the file is read
FROM_DISK = (
    "all of stage 3 missing",
    "step 1000000000",
    "betas",
    "state in a list",
    "rng.torch 4",
    "a tensor as key",
    "a weight with a name that no terminal shows",
    "a setting beyond what is read",
    "control characters in the environment",
    "another seed",
)


@of_old_tensors
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FROM_DISK else pytest.mark.thorough) for name in CASES]
)
def test_a_damaged_file_leaves_what_the_older_one_holds(name, folder, content, sound):
    replace(folder, damaged(content, name))
    if CASES[name].outcome == REFUSED:
        with pytest.raises(UserError) as refused:
            resumed(folder)
        require_sentence(name, str(refused.value), CASES[name].says)
    else:
        run, said = resumed(folder)
        if not any("is not a readable checkpoint" in text for text in said):  # the reader of files was first
            require_sentence(name, "\n".join(said), CASES[name].says)
        assert equal(everything(run), sound[OLDER if CASES[name].outcome == PASSED_OVER else NEWEST])


def test_the_table_is_not_a_short_one():
    assert len(CASES) >= 77


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory) -> Path:
    """The run, never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train_to(8, folder, photos)
    return folder


@pytest.mark.parametrize(
    "name", ["all of stage 3 missing", "betas", "step 1000000000", "a setting less that has a default"]
)
def test_losses_are_those_of_a_run_that_was_never_stopped(name, folder, content, photos, straight):
    replace(folder, damaged(content, name))
    train_to(8, folder, photos)
    assert losses(folder) == losses(straight)


@pytest.mark.thorough
def test_shapes_that_overflowed_the_heap(folder, content, photos, straight):
    """Each in a process of its own, which could be killed: the optimiser wrote behind the end of such moments."""
    script = (
        "import sys; from pathlib import Path; from helpers.training import run_tiny;"
        "run_tiny(Path(sys.argv[1]), list(map(Path, sys.argv[2:])), max_steps=8, ema_decay=0.9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    content = containers(content)
    for entry in content["optimizer"]["state"].values():
        entry["exp_avg"], entry["exp_avg_sq"] = torch.zeros(1), torch.zeros(0)
    replace(folder, content)
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *map(str, photos)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "it is passed over" in done.stdout, done
    assert losses(folder) == losses(straight)


# -- files


def link_to(target: str):
    return lambda path: path.symlink_to(target)


FILES = {
    "a FIFO": (os.mkfifo, "is a FIFO, expected a regular file"),
    "a folder": (Path.mkdir, "is a folder, expected a regular file"),
    "a device": (link_to("/dev/zero"), "is a device, expected a regular file"),
    "a link to itself": (link_to(NEWEST), "Too many levels"),
    "a link to nothing": (link_to("nowhere"), "o such file"),
    "empty": (Path.touch, "is not a readable checkpoint"),
    "a text": (lambda path: path.write_text("[1, 2]"), "is not a readable checkpoint"),
}


@pytest.mark.skipif(os.name != "posix", reason="such files are POSIX")
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_passed_over(name, folder, sound):
    make, says = FILES[name]
    (folder / NEWEST).unlink()
    make(folder / NEWEST)
    run, notes = resumed(folder)
    assert run.outcome.step == 4
    assert len(notes) == 1 and str(folder / NEWEST) in notes[0] and says in notes[0]


def test_names_that_no_run_writes_are_no_checkpoints(folder):
    for name in ("checkpoint-06.pt", "checkpoint-\u0669.pt", f"checkpoint-{'9' * 200}.pt", "checkpoint-7.pt.bak"):
        shutil.copy(folder / NEWEST, folder / name)
    run, notes = resumed(folder)
    assert run.outcome.resumed_from == folder / NEWEST and notes == []


def test_a_checkpoint_under_another_name_is_passed_over(folder):
    shutil.copy(folder / OLDER, folder / "checkpoint-9.pt")
    run, notes = resumed(folder)
    assert run.outcome.step == 6
    assert "step is 4, expected 9, the number in the name of the file" in notes[0]


def test_nothing_but_damaged_checkpoints_names_each(folder, content):
    (folder / OLDER).unlink()
    replace(folder, damaged(content, "all of stage 3 missing"))
    with pytest.raises(UserError, match=r"every checkpoint is damaged.*model\.encoder\.stages\.3\..* is missing"):
        resumed(folder)


def test_what_cannot_be_deleted_ends_no_run(tmp_path):
    """A folder under the name of a checkpoint, or of a file that a killed process left."""
    for name in ("checkpoint-1.pt", ".log.jsonl.12.0123abcd.tmp"):
        (tmp_path / name / "inside").mkdir(parents=True)
    remove_abandoned(tmp_path)
    checkpoint.prune_checkpoints(tmp_path, newest=5, max_checkpoints=0)
    assert len(list(tmp_path.iterdir())) == 2


# -- restoring


def restore(content: dict) -> torch.nn.Module:
    model = tiny_model(seed=1)
    optimizer = make_optimizer(parameter_groups(model, 0.05), 1e-3, (0.9, 0.95))
    checkpoint.restore_state(model, optimizer, None, content, Spread().world)
    return model


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_stage_3, "model.encoder.stages.3."),
        (put("model", "more", to=torch.ones(1)), "model.more is there"),
        (lambda content: content["optimizer"]["state"].popitem(), "is missing"),
        (lambda content: content["optimizer"]["state"]["mask_token"].pop("exp_avg"), "mask_token.exp_avg is missing"),
    ],
)
def test_restoring_is_strict_by_itself(content, damage, says):
    content = copy.deepcopy(content)
    damage(content)
    with pytest.raises(UserError, match="cannot be restored") as refused:
        restore(content)
    assert says in str(refused.value)


def test_restoring_leaves_the_checkpoint_as_it_is(content):
    before = copy.deepcopy(content)
    model = restore(content)
    assert equal(content, before) and equal(dict(model.state_dict()), dict(content["model"]))


# -- the best result of fine-tuning

BEST = {"top1": 50.0, "epoch": 1, "step": 6, "averaged": True}


def check(best: object, ema_decay: float | None = 0.9, step: int = 9) -> None:
    check_best(best, step, SimpleNamespace(steps_per_epoch=3, epochs=5, ema_decay=ema_decay))


def test_a_best_result_that_a_run_can_have():
    check({})
    check(BEST)
    check({**BEST, "top1": 0.0, "averaged": False}, None)
    check({name: value for name, value in BEST.items() if name != "averaged"})  # of an older version


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top1": float("nan")}, "task.best.top1 is nan"),
        ({"top1": 101.0}, "task.best.top1 is 101.0"),
        ({"top1": -1.0}, "task.best.top1 is -1.0"),
        ({"top1": "50"}, "task.best.top1 is '50'"),
        ({"top1": torch.tensor(50.0)}, "task.best.top1 is a float32 tensor"),
        ({"top1": True}, "task.best.top1 is True"),
        ({"epoch": 3, "step": 12}, "task.best.epoch is 3, expected one of the 3 epochs that are done"),
        ({"epoch": -1, "step": 0}, "task.best.epoch is -1"),
        ({"epoch": True}, "task.best.epoch is True"),
        ({"epoch": 10**300}, "task.best.epoch is an integer of 997 bits"),
        ({"step": 7}, "task.best.step is 7, expected 6"),
        ({"step": 6.0}, "task.best.step is 6.0"),
        ({"averaged": 1}, "task.best.averaged is 1"),
        ({"more": 1}, "task.best.more"),
    ],
)
def test_a_best_result_that_no_run_can_have(change, says):
    with pytest.raises(ValueError) as refused:
        check({**BEST, **change})
    assert says in str(refused.value)


def test_a_best_result_of_another_kind():
    for best, says in (([], "task.best is [], expected a dict"), ({"top1": 1.0}, "task.best.epoch is missing")):
        with pytest.raises(ValueError) as refused:
            check(best)
        assert says in str(refused.value)
    with pytest.raises(ValueError, match=r"task\.best\.averaged is True, expected False"):
        check(BEST, None)


# -- writing


@pytest.mark.parametrize("part", ["model", "model_ema", "exp_avg_sq"])
def test_what_could_not_be_resumed_is_not_written(tmp_path, content, part):
    content = copy.deepcopy(content)
    tensors = content["optimizer"]["state"]["mask_token"] if part == "exp_avg_sq" else content[part]
    name = "exp_avg_sq" if part == "exp_avg_sq" else "mask_token"
    tensors[name][0, 0] = float("inf")
    with pytest.raises(UserError, match=r"step 6: .*parameter mask_token is no longer finite; no checkpoint"):
        checkpoint.write_checkpoint(tmp_path, 6, content)
    assert list(tmp_path.iterdir()) == []


# -- processes


SPREAD = ("all of stage 3 missing", f"optimizer.state.{PROJ}.exp_avg: smaller", "betas")
FOLDERS = (*SPREAD, "another seed", "only the older one", "untouched")


def _two(rank: int, ports: list[int], root: Path, photos: list[Path]) -> None:
    join(rank, ports[0])
    with processes("cpu") as world:
        for parallel in ("ddp", "fsdp"):
            for name in FOLDERS:
                output = root / f"{parallel} {name}"
                try:
                    outcome = run_tiny(output, photos, max_steps=8, split=Spread(world, parallel), ema_decay=0.9)
                    answer = outcome.resumed_from.name
                except UserError as error:
                    answer = str(error)
                (output / f"answer {rank}").write_text(answer)


@needs_gloo
@pytest.mark.thorough
def test_two_processes_pass_over_the_same_checkpoint(original, content, photos, tmp_path):
    for parallel in ("ddp", "fsdp"):
        for name in FOLDERS:
            shutil.copytree(original, folder := tmp_path / f"{parallel} {name}")
            if name in CASES:
                replace(folder, damaged(content, name))
        (tmp_path / f"{parallel} only the older one" / NEWEST).unlink()
    spawn(_two, tmp_path, photos)
    for parallel in ("ddp", "fsdp"):
        folders = [tmp_path / f"{parallel} {name}" for name in FOLDERS]
        *older, refused, without, untouched = [[(f / f"answer {i}").read_text() for i in (0, 1)] for f in folders]
        assert [*older, without] == [[OLDER] * 2] * 4 and untouched == [NEWEST] * 2
        assert refused[0] == refused[1] and "seed: 8 in the checkpoint, 7 now" in refused[0]
        expected = losses(folders[-2])
        assert len(expected) == 8 and all(losses(folder) == expected for folder in folders[:3])


class Anything:
    """Attributes from a dict, whichever are asked for."""

    def __init__(self, values: dict):
        self.__dict__["values"] = values

    def __getattr__(self, name: str) -> object:
        return self.values[name]


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file grows beyond ``most`` bytes, as on a disk that is full."""
    import resource  # of POSIX

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX")
@pytest.mark.parametrize("what", ["checkpoint-6.pt", "model.safetensors", "encoder.safetensors", "config.json"])
@pytest.mark.parametrize("most", [0, 700])
def test_a_disk_that_is_full_is_called_so(tmp_path, content, what, most):
    options = defaultdict(int, output=tmp_path, resolved=SimpleNamespace(recipe="x", note="", origins={}))
    write = {
        "checkpoint-6.pt": lambda path: checkpoint.write_checkpoint(tmp_path, 6, content),
        "model.safetensors": lambda path: checkpoint.export_weights(path, content["model"], {}),
        "encoder.safetensors": lambda path: checkpoint.export_encoder(path, tiny_model(), "x"),
        "config.json": lambda path: write_settings(Anything(options), CONFIG),
    }[what]
    path = tmp_path / what
    path.write_text("as before")
    with small_files(most), pytest.raises(UserError) as refused:
        write(path)
    assert str(refused.value) == f"cannot write {path}: File too large"
    assert path.read_text() == "as before" and [p.name for p in tmp_path.iterdir()] == [what]


# -- the commands


def finetune(photos: Path, output: Path, *more: str) -> int:
    words = "finetune --model convnextv2_atto --img-size 32 --epochs 3 --batch-size 4 --mixup 0 --cutmix 0".split()
    words += "--val-share 0.34 --workers 0 --device cpu --ema-decay 0.5 --keep 9".split()
    return main([*words, "--data", str(photos), "--output", str(output), *more])


@pytest.mark.thorough
def test_fine_tuning_passes_over_a_best_result_that_cannot_be(tmp_path, capsys):
    photos, output = class_folder(tmp_path / "photos", 2, 6), tmp_path / "run"
    assert finetune(photos, output, "--max-steps", "4") == 0
    shutil.copytree(output, tmp_path / "straight")
    assert finetune(photos, tmp_path / "straight") == 0
    newest = output / "checkpoint-4.pt"
    content = torch.load(newest, weights_only=True)
    assert content["task"]["best"]["epoch"] in (0, 1)
    content["task"]["best"]["top1"] = 1000.0
    torch.save(content, newest)
    capsys.readouterr()
    assert finetune(photos, output) == 0
    said = capsys.readouterr().out
    assert "task.best.top1 is 1000.0, expected a share in percent; it is passed over" in said
    assert losses(output) == losses(tmp_path / "straight")


SETTINGS = {
    "no JSON": ("{", "is not valid JSON"),
    "deep": ("[" * 100_000, "is nested more than"),
    "a huge integer": ('{"config": ' + "9" * 400 + "}", "beyond 64 bits"),
    "a list": ("[]", "the content is [], expected an object"),
    "no settings": ("{}", "config is missing"),
    "settings of None": ('{"config": null}', "config is None, expected a dict"),
    "empty settings": ('{"config": {}}', "config.model is missing"),
    "a text for epochs": ({"epochs": "3"}, "config.epochs is '3', expected an integer"),
    "True for epochs": ({"epochs": True}, "config.epochs is True, expected an integer"),
    "NaN": ({"lr": float("nan")}, "config.lr is nan, expected a finite number"),
    "a list for the model": ({"model": ["a"]}, "config.model is ['a'], expected a text"),
    "one side": ({"img_size": [64]}, "config.img_size is [64], expected [an integer, an integer]"),
    "an unknown setting": ({"more": 1}, "config.more is there"),
    "another seed": ({"seed": 9}, "seed: 9 in the checkpoint, 7 now"),
    "a surrogate": ({"model": "\udc80\x1b[2J"}, r"model: \udc80\x1b[2J in the checkpoint"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_were_edited_are_refused_in_a_sentence(name, tmp_path):
    (tmp_path / "checkpoint-1.pt").touch()
    content, says = SETTINGS[name]
    if isinstance(content, dict):
        content = json.dumps({"config": {**CONFIG.to_dict(), **content}})
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as refused:
        write_settings(SimpleNamespace(output=tmp_path), CONFIG)
    said = str(refused.value)
    assert "config.json" in said and says in said and said.isprintable()
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.skipif(os.name != "posix", reason="such files are POSIX")
def test_settings_that_are_no_file_are_refused(tmp_path):
    (tmp_path / "checkpoint-1.pt").touch()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="is a FIFO, expected a regular file"):
        write_settings(SimpleNamespace(output=tmp_path), CONFIG)


def test_settings_older_than_a_setting_have_its_default(tmp_path):
    saved = CONFIG.to_dict()
    del saved["encoding"], saved["hflip"]
    require_same_config(saved, CONFIG, "here")
    with pytest.raises(UserError, match=r"encoding: sparse in the checkpoint, masked_dense now"):
        require_same_config(saved, dataclasses.replace(CONFIG, encoding="masked_dense"), "here")


# -- anything

JUNK = (
    None, True, False, 0, 1, -1, 2**70, 1e308, math.nan, math.inf, "", "x", "\udc80", b"x", [], {}, (), [1], {"a": 1},
    {1: 2}, (1, 2, 3), torch.tensor(1.0), torch.zeros(0), torch.zeros(3), torch.zeros(3).to_sparse(), torch.float32,
    torch.zeros(3, device="meta"), torch.Size([1]), 1j, set(), range(3),
)  # fmt: skip
# What a run may resume with, as it decides no loss: settings and PyTorch's defaults stand in for it.
HARMLESS = re.compile(
    r"environment.*|evaluation_pending|task(\.about.*)?|config\.\w+(\.\d)?|"
    r"optimizer\.param_groups\.\d\.(lr|maximize|amsgrad|foreach|capturable|differentiable)"
)


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


@pytest.mark.thorough
def test_whatever_is_put_anywhere_is_refused_or_harmless(folder, content):
    """Three thousand changes of a place, at most two a time; every kind of place as often as any other."""
    (folder / NEWEST).unlink()
    run, _ = resumed(folder)
    expected = Expected.of(run.task, run.optimizer, run.average)
    kinds: dict[str, list[tuple]] = {}
    for path in places(content):
        kinds.setdefault(re.sub(r"[\w.]*\.[\w.]*|mask_token", "*", " ".join(map(str, path))), []).append(path)
    del kinds[""]
    draw = random.Random(0)
    for _ in range(3000):
        changed, paths = containers(content), []
        for _ in range(draw.choice((1, 1, 2))):
            paths.append(path := draw.choice(kinds[draw.choice(list(kinds))]))
            with suppress(KeyError, IndexError, TypeError):  # where the first change left no such place
                draw.choice((put(*path, to=draw.choice(JUNK)), drop(*path)))(changed)
        try:
            check_format(changed)
            check_settings(changed, run.task.config)
            require_same_config(changed["config"], run.task.config, "it")
            check_state(changed, 6, expected)
        except (ValueError, UserError) as error:
            assert type(error) in (ValueError, UserError) and str(error).isprintable() and len(str(error)) < 2000
        else:
            used = [path for path in paths if not HARMLESS.fullmatch(".".join(map(str, path)))]
            assert all(unchanged(content, changed, path) for path in used), used


def unchanged(before: object, after: object, path: tuple) -> bool:
    """Whether a place holds what it held, or what equals it."""
    for key in path:
        before, after = before[key], after[key]
    return equal(before, after)
