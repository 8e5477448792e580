import os

import pytest
import torch
from helpers.training import CONFIG, tiny_model

from convnextv2_kernels import _files
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.train import checkpoint
from convnextv2_kernels.train.loggers import StepLog
from convnextv2_kernels.train.optim import make_optimizer, parameter_groups


def save(folder, step, model=None):
    model = tiny_model() if model is None else model
    optimizer = make_optimizer(parameter_groups(model, 0.05), 1e-3, (0.9, 0.95))
    state = checkpoint.gather_state(model, optimizer, None)
    epoch, position = divmod(step, 4)
    more = {"epoch": epoch, "position": position, "rng": checkpoint.rng_state(), "config": CONFIG.to_dict(), "task": {}}
    return checkpoint.write_checkpoint(folder, step, {**state, **more})


def test_round_trip_is_plain_data(tmp_path):
    model = tiny_model()
    path = save(tmp_path, 6, model)
    assert path.name == "checkpoint-6.pt"
    state = torch.load(path, weights_only=True)
    assert (state["step"], state["epoch"], state["position"]) == (6, 1, 2)
    assert state["config"] == CONFIG.to_dict()
    assert all(torch.equal(state["model"][k], v) for k, v in model.state_dict().items())


def test_random_states_come_back(tmp_path):
    torch.manual_seed(5)
    state = checkpoint.load_checkpoint(save(tmp_path, 1, tiny_model()))
    expected = torch.rand(3)
    checkpoint.set_rng_state(state["rng"])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_newest_is_passed_over_by_name(tmp_path, damage):
    good, bad = save(tmp_path, 3), save(tmp_path, 5)
    data = bytearray(bad.read_bytes())
    if damage == "flip":  # In the middle of a tensor, where unpickling notices nothing.
        data[len(data) // 2] ^= 0x40
    elif damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    bad.write_bytes(data)
    if damage == "other":
        torch.save({"model": {}}, bad)
    state, path, warnings = checkpoint.newest_valid(tmp_path)
    assert state["step"] == 3 and path == good
    assert len(warnings) == 1 and str(bad) in warnings[0]


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    assert checkpoint.newest_valid(tmp_path) == (None, None, [])
    (tmp_path / "checkpoint-4.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="every checkpoint is damaged.*checkpoint-4.pt"):
        checkpoint.newest_valid(tmp_path)


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = save(tmp_path, 2)
    before = path.read_bytes()

    def fail(*args):
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    with _files.atomic_file(tmp_path / "x") as file:
        file.write(b"1")
        assert not (tmp_path / "x").exists()
    assert calls == ["fsync", "replace", "fsync"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.proj.bias[0] = float("nan")
    with pytest.raises(UserError, match="step 9: parameter proj.bias"):
        save(tmp_path, 9, model)
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_last_and_spares_later_ones(tmp_path):
    for step in (2, 4, 10, 100):
        save(tmp_path, step)
    checkpoint.prune_checkpoints(tmp_path, newest=10, max_checkpoints=2)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [100, 10, 4]


def test_log_drops_later_and_half_written_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    for step in range(1, 5):
        log.write({"step": step, "loss": 1 / 3})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 5, "lo')
    StepLog(path, 5).close()
    assert len(path.read_text().splitlines()) == 4
    log = StepLog(path, 2)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert path.read_text().splitlines()[1:] == ['{"step": 2, "loss": 0.3333333333333333}', '{"step": 3, "loss": 0.5}']
