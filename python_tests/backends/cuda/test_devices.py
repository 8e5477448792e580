"""Which GPUs a build serves, and that a step on one neither waits nor minds streams and devices."""

from __future__ import annotations

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels.backends import cuda

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.EMULATED or cuda.load_error() is not None, reason="no CUDA device or kernels"
)


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),  # a later minor version of the same family
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("compute_80", (12, 0), True),
        ("compute_90a", (10, 0), False),
        ("compute_100", (9, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(architecture, capability, runs):
    assert cuda.runs_on(architecture, *capability) is runs


def make_step(device="cuda"):
    torch.manual_seed(0)
    model = ck.models.FCMAE((1, 1, 1, 1), (16, 32, 48, 64), img_size=96, decoder_embed_dim=32, mask_ratio=0.5)
    model, images = model.to(device), torch.randn(4, 3, 96, 96).to(device)
    layout = ck.PatchLayout.from_kept(ck.random_kept(4, (3, 3), 0.5).to(device), (3, 3))

    def step():
        model.zero_grad()
        with ck.use_backend("cuda"), torch.autocast("cuda", torch.bfloat16):
            loss = model(images, layout)[0]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    return step


@pytest.mark.gpu
@needs_gpu
def test_a_step_never_synchronises():
    step = make_step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_another_stream_gives_the_same_bits():
    step = make_step()
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current_gives_the_same_bits():
    expected = make_step("cuda:0")()
    got = make_step("cuda:1")()
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, got, strict=True))
