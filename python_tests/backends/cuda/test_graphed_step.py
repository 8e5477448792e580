"""A whole FCMAE training step in a CUDA graph."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convnextv2_kernels as ck

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return ck.models.FCMAE((1, 1, 2, 1), (16, 32, 48, 64), img_size=96, decoder_embed_dim=32, mask_ratio=0.5)


def test_images_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="images must be a tensor on a CUDA device"):
        ck.make_graphed_step(make_model(), torch.randn(2, 3, 96, 96))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("autocast", (None, torch.bfloat16))
def test_a_replayed_step_equals_the_eager_one(autocast):
    model = make_model().cuda()
    twin = copy.deepcopy(model)
    sample, images = (torch.randn(4, 3, 96, 96, device="cuda") for _ in range(2))
    mask = ck.random_mask(4, (3, 3), 0.5, device="cuda")
    layout = ck.PatchLayout.from_kept((~mask).flatten(1).nonzero()[:, 1].view(4, -1), (3, 3))

    def loss(m, x):
        return m(x, layout)[0]

    step = ck.make_graphed_step(model, sample, loss, autocast=autocast)
    for batch in (images, sample, images):
        got = step(batch)
        twin.zero_grad()
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            expected = loss(twin, batch)
        expected.backward()
        assert torch.equal(got, expected), "the same kernels in the same order give the same bits"
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name


@pytest.mark.gpu
@needs_gpu
def test_replays_draw_new_masks():
    images = torch.randn(4, 3, 96, 96, device="cuda")
    step = ck.make_graphed_step(make_model().cuda(), images)
    assert len({float(step(images)) for _ in range(4)}) > 1


@pytest.mark.gpu
@needs_gpu
def test_the_optimizer_inside_the_graph_trains_as_outside():
    model = make_model().cuda()
    twin = copy.deepcopy(model)
    images = torch.randn(4, 3, 96, 96, device="cuda")
    layout = ck.PatchLayout.from_kept(ck.random_kept(4, (3, 3), 0.5, device="cuda"), (3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    outside = torch.optim.AdamW(twin.parameters(), lr=1e-3, capturable=True)
    step = ck.make_graphed_step(model, images, lambda m, x: m(x, layout)[0], optimizer)
    for _ in range(3):
        got = step(images)
        outside.zero_grad()
        expected = twin(images, layout)[0]
        expected.backward()
        outside.step()
        assert torch.equal(got, expected)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_captured_is_refused():
    model, images = make_model().cuda(), torch.randn(2, 3, 96, 96, device="cuda")
    with pytest.raises(ValueError, match="optimizer must be Adam or AdamW"):
        ck.make_graphed_step(model, images, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="capturable=True"):
        ck.make_graphed_step(model, images, optimizer=torch.optim.Adam(model.parameters()))
    step = ck.make_graphed_step(model, images)
    with pytest.raises(ValueError, match="was captured for"):
        step(images[:1])


def test_the_example_runs_or_says_what_it_needs():
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "examples/graphed_pretraining.py", "--steps", "2", "--batch-size", "2"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    if torch.cuda.is_available():
        assert done.returncode == 0 and "images/s" in done.stdout, done.stderr
    else:
        assert done.returncode == 1 and "needs a CUDA device" in done.stderr, done.stderr
