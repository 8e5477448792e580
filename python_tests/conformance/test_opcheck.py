"""``torch.library.opcheck`` of every operator the package registers: schema, fake, autograd registration, tracing.

The operators are read from the dispatcher, so that a new one without a sample fails here.
"""

from __future__ import annotations

import pytest
import torch

from convnextv2_kernels import backends
from convnextv2_kernels.settings import current

from .backends import BACKENDS, BF16, F32, F64, dtype_name, marks, needs_cpu_kernels, parametrize_backends
from .operators import ONLY, SAMPLES, Draw, names_on, operator, registered


@needs_cpu_kernels
def test_every_operator_has_a_sample():
    assert registered(), "no operator is registered"
    assert sorted(SAMPLES) == registered()


def _cases():
    for backend in BACKENDS:
        for name in names_on(backend):
            for dtype, optional in ((F32, True), (BF16, True), (F64, False)):
                if dtype in ONLY.get(name, backend.dtypes):
                    label = "with" if optional else "without"
                    label = f"{backend.name}-{name}-{dtype_name(dtype)}-{label}_optional"
                    yield pytest.param(backend, name, dtype, optional, id=label, marks=marks(backend))


@pytest.mark.parametrize(("backend", "name", "dtype", "optional"), list(_cases()))
def test_opcheck(backend, name, dtype, optional):
    _ = backends.get(backend.name).operators  # registers them
    draw = Draw(dtype, backend.device, optional, backend.name)
    torch.library.opcheck(operator(name, backend), SAMPLES[name](draw))


@pytest.mark.parametrize("policy", ["normalized", "hidden"])
@pytest.mark.parametrize("name", ["mlp_forward", "mlp_backward", "block_forward", "block_backward"])
@parametrize_backends()
def test_opcheck_of_other_save_policies(backend, name, policy, monkeypatch):
    """The fakes must predict the tensors that each policy saves."""
    monkeypatch.setattr(current, "save", policy)
    test_opcheck(backend, name, F32, True)
