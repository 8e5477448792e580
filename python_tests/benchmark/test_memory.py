import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convnextv2_kernels.benchmark.baseline import Baseline
from convnextv2_kernels.benchmark.memory import peak_in_subprocess, saved_bytes
from convnextv2_kernels.benchmark.variants import make_batch, make_dense, make_sparse

ROOT = Path(__file__).resolve().parents[2]


def test_each_storage_counts_once_and_in_full():
    x = torch.ones(1000, requires_grad=True)

    def forward():
        y = x.exp()  # saves its result
        return (y * y[:].flip(0) + y.sin()).sum()  # saves y, a flipped copy of y, and y again

    assert saved_bytes(forward) == 2 * 4000
    assert x.grad is not None


def test_a_saved_view_counts_its_whole_storage():
    x = torch.ones(10, requires_grad=True)
    big = torch.ones(1000)
    assert saved_bytes(lambda: (x * big[:10]).sum(), [x]) == 4000


def test_excluded_tensors_do_not_count():
    x = torch.ones(1000, requires_grad=True)
    weight = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: (x * weight).sum()) == 8000
    assert saved_bytes(lambda: (x * weight.view(10, 100).view(-1)).sum(), [weight]) == 4000


def test_what_a_dropped_graph_saved_does_not_count():
    x = torch.ones(1000, requires_grad=True)

    def forward():
        x.exp().exp()
        return (2.0 * x).sum()

    assert saved_bytes(forward, [x]) == 0


def retained_bytes(forward):
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss = forward()
    events = profiler.profiler.kineto_results.events()
    total = sum(event.nbytes() for event in events if event.name() == "[memory]")
    loss.backward()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_nothing_is_kept_that_the_hooks_do_not_see(which, dtype):
    variant = make_sparse("convnextv2_atto", seed=0)
    if which == "dense":
        variant = make_dense(variant, [Baseline("channels_last", "conv1x1")])[0]
    batch = make_batch(2, 96, seed=0, dtype=dtype)
    alive = [*variant.model.parameters(), batch.images, batch.mask]
    variant.step(batch)
    saved = saved_bytes(lambda: variant.forward(batch)[0], alive)
    retained = retained_bytes(lambda: variant.forward(batch)[0])
    # Allocation rounds up; the loss itself is kept too.
    assert saved <= retained * 1.01 + 1024
    assert retained <= saved * 1.01 + 16384


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux")
def test_peak_of_a_known_allocation():
    script = (
        "import json, torch\n"
        "from convnextv2_kernels.benchmark.memory import step_peak_bytes\n"
        "def step():\n"
        "    a = torch.ones(100 * 2**18)\n"
        "    del a\n"
        "    b, c = torch.ones(60 * 2**18), torch.ones(20 * 2**18)\n"
        "print(json.dumps(step_peak_bytes(step)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == pytest.approx(100 * 2**20, rel=0.05)


def test_a_failing_worker_is_reported():
    result = peak_in_subprocess(["--model", "convnextv2_atto"], timeout=120)
    assert result["bytes"] is None
    assert "required" in result["reason"]
