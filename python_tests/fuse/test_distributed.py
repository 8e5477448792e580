"""Two processes: a fused model under DDP and FSDP2, fused before and after wrapping, gives the gradients of one."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist

import convnextv2_kernels as ck

from .networks import results_of, small_timm_model


def _wrap(kind: str, model: torch.nn.Module) -> torch.nn.Module:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _work(rank: int, port: int, kinds: tuple[str, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = small_timm_model().double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 48, dtype=torch.float64, generator=generator)
    cotangent = torch.randn(4, 10, dtype=torch.float64, generator=generator)
    expected = results_of(model, images, cotangent)
    mine = slice(2 * rank, 2 * rank + 2)
    for kind in kinds:
        for fused_first in (True, False):
            network = copy.deepcopy(model)
            if fused_first:
                ck.fuse(network)
            network = _wrap(kind, network)
            if not fused_first:
                assert len(ck.fuse(network).replaced) == 5
            # the mean over two processes of the halves is half of the sum
            network(images[mine]).backward(2 * cotangent[mine])
            inner = network.module if kind == "ddp" else network
            for name, p in inner.named_parameters():
                grad = p.grad if kind == "ddp" else p.grad.full_tensor()
                error = float((grad - expected[name]).abs().max() / expected[name].abs().max())
                assert error < 1e-10, f"{kind}, fused {'before' if fused_first else 'after'}: {name} is off by {error}"
            assert ck.unfuse(network) == 5
            network(images[mine])
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")
def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_work, (port, ("ddp", "fsdp")), nprocs=2)
