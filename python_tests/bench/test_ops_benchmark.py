"""Each op under pytest-benchmark, sparse and dense, on the stages of convnextv2_atto: forward, and with backward.

With ``--benchmark-disable`` (the default of the test suite) every variant runs once on one image. What a call saves for
backward and its peak of PyTorch's allocator are in ``extra_info``; both are counted outside of the timed calls.
"""

import gc

import pytest
import torch

from bench.ops.cases import SPECS
from bench.ops.measure import OpCase
from bench.profiler import events_of, peak_bytes, requests
from convnextv2_kernels import ops, random_mask
from convnextv2_kernels.benchmark.memory import saved_bytes
from convnextv2_kernels.benchmark.variants import SPARSE

STAGES = [(40, 8), (80, 4), (160, 2), (320, 1)]
CASES = [
    pytest.param(spec, width, side, name, id=f"{spec.name}-C{width}-s{side}-{name}")
    for width, side in STAGES
    for spec in SPECS
    for name in (SPARSE, *spec.dense)
    if spec.fits(side)
]


def bind(spec, width, side, name, images):
    mask = random_mask(images, (7, 7), generator=torch.Generator().manual_seed(0))
    case = OpCase(spec, width, side, mask, torch.float32, seed=0)
    return case, case.variants()[name]


def memory(bound) -> dict[str, int]:
    """Bytes saved for backward, and the most that one forward and backward allocate beyond what is there before."""
    alive = list(bound.leaves.values())
    saved = saved_bytes(lambda: (bound.run() * bound.cotangent).sum(), [*alive, bound.cotangent])
    for leaf in alive:
        leaf.grad = None
    gc.collect()
    return {"saved_bytes": saved, "peak_bytes": peak_bytes(requests(events_of(bound.forward_backward, "cpu"), "cpu"))}


def measured(benchmark, spec, width, side, name):
    """The variant, with its counts and its memory noted."""
    images = 1 if benchmark.disabled else 8
    case, bound = bind(spec, width, side, name, images)
    work = case.work(dense=case.is_dense(name))
    benchmark.group = f"{spec.name} C={width} s={side}"
    benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, images=images, **memory(bound))
    return bound


@pytest.mark.parametrize(("spec", "width", "side", "name"), CASES)
def test_forward_backward(benchmark, spec, width, side, name):
    output, gradients = benchmark(measured(benchmark, spec, width, side, name).forward_backward)
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(("spec", "width", "side", "name"), CASES)
def test_forward(benchmark, spec, width, side, name):
    bound = measured(benchmark, spec, width, side, name)
    benchmark.group += ", forward"
    with torch.no_grad():
        assert torch.isfinite(benchmark(bound.run)).all()


def test_no_public_op_is_missing():
    assert {case.values[0].op for case in CASES if case.values[3] == SPARSE} == set(ops.__all__)


def test_memory_is_that_of_the_tensors():
    """LayerNorm keeps its input, alive anyway, and two statistics a row; backward makes two maps and two vectors."""
    spec = next(spec for spec in SPECS if spec.name == "layer_norm")
    case, bound = bind(spec, 40, 8, SPARSE, 1)
    rows = case.rows(dense=False)
    found = memory(bound)
    assert found["saved_bytes"] == 4 * 2 * rows
    assert 4 * 2 * 40 * rows <= found["peak_bytes"] <= 4 * 3 * 40 * rows
