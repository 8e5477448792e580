"""Each op under pytest-benchmark, sparse and dense, on the stages of convnextv2_atto.

With ``--benchmark-disable`` (the default of the test suite) every variant runs once on one image.
"""

import pytest
import torch

from bench.ops.cases import SPECS
from bench.ops.measure import OpCase
from convnextv2_kernels import random_mask
from convnextv2_kernels.benchmark.variants import SPARSE

STAGES = [(40, 8), (80, 4), (160, 2), (320, 1)]
CASES = [
    pytest.param(spec, width, side, name, id=f"{spec.name}-C{width}-s{side}-{name}")
    for width, side in STAGES
    for spec in SPECS
    for name in (SPARSE, *spec.dense)
    if side >= spec.stride
]


@pytest.mark.parametrize(("spec", "width", "side", "name"), CASES)
def test_forward_backward(benchmark, spec, width, side, name):
    images = 1 if benchmark.disabled else 8
    mask = random_mask(images, (7, 7), generator=torch.Generator().manual_seed(0))
    case = OpCase(spec, width, side, mask, torch.float32, seed=0)
    bound = case.variants()[name]
    work = case.work(dense=name != SPARSE)
    benchmark.group = f"{spec.name} C={width} s={side}"
    benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, images=images)
    output, gradients = benchmark(bound.forward_backward)
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
