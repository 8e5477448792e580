"""Two processes over gloo give the run of one: DDP and FSDP2, resumed on another number of them, stopped together."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from convnextv2_kernels.errors import UserError
from convnextv2_kernels.train.distributed import processes
from convnextv2_kernels.train.trainer import Spread

from .conftest import run_tiny, tiny_model

STEPS = 6
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def values(output: Path, *names: str) -> torch.Tensor:
    return torch.tensor([[r[name] for name in names] for r in records(output)], dtype=torch.float64)


def run(output: Path, sources: list, world=None, parallel="ddp", accumulate=1, **changes):
    split = Spread(parallel=parallel, accumulate=accumulate) if world is None else Spread(world, parallel, accumulate)
    settings = {"batch_size": 4, "epochs": 3, "precision": "float64", "ema_decay": 0.5, **changes}
    return run_tiny(output, sources, split=split, **settings)


class _Poisoned(type(tiny_model())):
    """Its images become NaN in the second process at the third step."""

    calls = 0

    def forward(self, images, mask=None):
        self.calls += 1
        if self.calls >= 3 and dist.get_rank() == 1:
            images = images * float("nan")
        return super().forward(images, mask)


class _Signalled(type(tiny_model())):
    """The second process alone is told to stop in its second step."""

    calls = 0

    def forward(self, images, mask=None):
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(images, mask)


def _other(kind):
    model = tiny_model()
    model.__class__ = kind
    return model


def _work(rank: int, port: int, folder: str, names: list[str]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    root, sources = Path(folder), [Path(name) for name in names]
    with processes("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (rank, 2, rank == 0)
        run(root / "ddp", sources, world)
        run(root / "fsdp", sources, world, "fsdp")
        run(root / "float32", sources, world, precision="float32")
        run(root / "accumulated", sources, world, accumulate=2)
        # 2 processes, and again as shards; the one process in between is the parent's
        run(root / "changing", sources, world, max_steps=2)
        outcome = run(root / "stopped", sources, world, model=_other(_Signalled))
        assert outcome.stop_signal == signal.SIGTERM and outcome.step == 2 and outcome.checkpoint.exists()
        with pytest.raises(UserError, match=r"step 3 .*loss is nan.*the output of encoder\.downsample_layers\.0"):
            run(root / "poisoned", sources, world, model=_other(_Poisoned))
        with pytest.raises(UserError, match="a batch of 3 images cannot be split evenly over 2 process"):
            run(root / "uneven", sources, world, batch_size=3)
        with pytest.raises(UserError, match="no such thing"):
            world.from_main(_fail)


def _fail():
    raise UserError("no such thing")


def _shards(rank: int, port: int, folder: str, names: list[str]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    with processes("cpu") as world:
        outcome = run(Path(folder) / "changing", [Path(name) for name in names], world, "fsdp")
        assert outcome.resumed_from.name == "checkpoint-4.pt" and outcome.step == STEPS


def spawn(work, *args) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, *args), nprocs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sources) -> Path:
    """All runs: those of two processes, and those of one that they are compared with."""
    folder = tmp_path_factory.mktemp("processes")
    names = ["ddp", "fsdp", "float32", "accumulated", "changing", "stopped", "poisoned", "uneven", "one", "one32"]
    for name in names:
        (folder / name).mkdir()
    eight = [str(source) for source in sources[:8]]
    spawn(_work, str(folder), eight)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(folder / "one", sources[:8])
    run(folder / "one32", sources[:8], precision="float32", accumulate=2)
    run(folder / "changing", sources[:8], max_steps=4)
    torch.set_num_threads(threads)
    spawn(_shards, str(folder), eight)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "accumulated", "changing"])
def test_float64_run_is_that_of_one_process(folder, name):
    """Only the order of sums differs: a few hundred float64 roundings a step, carried through six AdamW steps."""
    ours, theirs = (values(folder / kind, "loss", "grad_norm") for kind in (name, "one"))
    assert ours.shape == (STEPS, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    a, b = (torch.load(folder / kind / f"checkpoint-{STEPS}.pt") for kind in (name, "one"))
    for key in ("model", "model_ema"):
        assert list(a[key]) == list(b[key])
        for parameter, tensor in a[key].items():
            # AdamW divides by a root of squares: where both are roundings, the quotient is not
            torch.testing.assert_close(tensor, b[key][parameter], rtol=1e-6, atol=1e-8, msg=f"{key} {parameter}")


def test_float32_is_bitwise_that_of_one_process_with_the_same_parts(folder):
    """Two halves are added either way, and a sum of two does not depend on their order."""
    names = ("loss", "lr")
    assert torch.equal(values(folder / "float32", *names), values(folder / "one32", *names))
    a, b = (torch.load(folder / name / f"checkpoint-{STEPS}.pt") for name in ("float32", "one32"))
    assert all(torch.equal(tensor, b["model"][name]) for name, tensor in a["model"].items())


def test_all_stop_where_one_is_told_to(folder):
    assert len(records(folder / "stopped")) == 2
    assert (folder / "stopped" / "checkpoint-2.pt").exists()


def test_weights_are_untouched_by_a_step_that_is_not_finite(folder):
    assert len(records(folder / "poisoned")) == 2
    state = torch.load(folder / "poisoned" / "checkpoint-2.pt")
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
