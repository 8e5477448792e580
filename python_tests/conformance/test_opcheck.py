"""``torch.library.opcheck`` of every operator the package registers: schema, fake, autograd registration, tracing.

The operators are read from the dispatcher, so that a new one without a sample fails here.
"""

from __future__ import annotations

import pytest
import torch

from convnextv2_kernels import backends

from .backends import BF16, F32, F64, dtype_name, needs_cpu_kernels, parametrize_backends
from .operators import NAMESPACE, ONLY, SAMPLES, Draw, registered


@needs_cpu_kernels
def test_every_operator_has_a_sample():
    assert registered(), "no operator is registered"
    assert sorted(SAMPLES) == registered()


def _cases():
    for name in SAMPLES:
        for dtype, optional in ((F32, True), (BF16, True), (F64, False)):
            if dtype in ONLY.get(name, (dtype,)):
                label = "with" if optional else "without"
                yield pytest.param(name, dtype, optional, id=f"{name}-{dtype_name(dtype)}-{label}_optional")


@pytest.mark.parametrize(("name", "dtype", "optional"), list(_cases()))
@parametrize_backends()
def test_opcheck(backend, name, dtype, optional):
    backends.primitives(backend.name)
    draw = Draw(dtype, backend.device, optional, backend.name)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.opcheck(op, SAMPLES[name](draw))


@pytest.mark.parametrize("policy", ["normalized", "hidden"])
@pytest.mark.parametrize("name", ["mlp_forward", "mlp_backward", "block_forward", "block_backward"])
@parametrize_backends()
def test_opcheck_of_other_save_policies(backend, name, policy, monkeypatch):
    """The fakes have to foresee what each policy keeps."""
    monkeypatch.setenv("CONVNEXTV2_KERNELS_SAVE", policy)
    test_opcheck(backend, name, F32, True)
