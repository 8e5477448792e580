"""Runs that two processes share over gloo: how the tests start them and read what they wrote."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.training import lines, run_tiny

from convnextv2_kernels.train.trainer import Outcome, Spread

STEPS = 6
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")


def values(output: Path, *names: str) -> torch.Tensor:
    """Numbers of each step of a run, float64 [steps, names]."""
    return torch.tensor([[r[name] for name in names] for r in lines(output / "log.jsonl")], dtype=torch.float64)


def run(output: Path, sources: list, world=None, parallel="ddp", accumulate=1, **changes) -> Outcome:
    """Six steps of four images, in this process or as one of ``world``."""
    split = Spread(parallel=parallel, accumulate=accumulate) if world is None else Spread(world, parallel, accumulate)
    settings = {"batch_size": 4, "epochs": 3, "precision": "float64", "ema_decay": 0.5, **changes}
    return run_tiny(output, sources, split=split, **settings)


def spawn(work: Callable[..., None], *args: object, ports: int = 1) -> None:
    """Call ``work(rank, ports, *args)`` in two processes, whose environment :func:`join` sets."""
    probes = [socket.socket() for _ in range(ports)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    numbers = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    torch.multiprocessing.spawn(work, (numbers, *args), nprocs=2)


def join(rank: int, port: int) -> None:
    """Make this process one of two, as torchrun does."""
    torch.set_num_threads(1)
    environment = {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(environment, MASTER_PORT=str(port))
