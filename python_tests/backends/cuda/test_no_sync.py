"""A training step over a uniform layout reads nothing back from the device, so that it can be captured in a graph."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnextv2_kernels import backends, models, use_backend
from convnextv2_kernels.backends import cuda
from convnextv2_kernels.ops import _dispatch, _operators
from convnextv2_kernels.settings import current

pytestmark = pytest.mark.skipif(cuda.load_error() is not None, reason=str(cuda.load_error()))

# operators whose result, or its size, is known only after the device has finished
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item", "bincount")


class NoSync(TorchDispatchMode):
    """Raises where an operator would wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.add(name)
        sized = (kwargs or {}).get("output_size") is not None
        if name in _SYNCS or (name == "repeat_interleave" and not sized):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_mode_catches_a_sync():
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(3).sum().item()


@pytest.mark.parametrize("save", ("inputs", "normalized", "hidden"))
@pytest.mark.parametrize("scope", ("image", "batch"))
def test_a_training_step_never_waits(save, scope, monkeypatch):
    monkeypatch.setattr(current, "save", save)
    # on a CPU the kept ids are checked, which is a read; on a GPU they are not
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    # a dispatch mode does not see into an operator, so the composite ones are called as functions
    for name in ("linear", "linear_input_grad", "linear_weight_grad"):
        monkeypatch.setattr(_operators, name, lambda *a, name=name: getattr(backends.get(a[-1]), name)(*a[:-1]))
    monkeypatch.setattr(_dispatch, "traced", lambda: False)
    model = models.FCMAE((1, 1, 1, 1), (8, 8, 12, 8), img_size=64, decoder_embed_dim=16, grn_scope=scope)
    model.to(cuda.CUDABackend.device_type)
    images = torch.randn(2, 3, 64, 64, device=cuda.CUDABackend.device_type)
    with use_backend("cuda"), NoSync() as mode:
        model(images)[0].backward()
    assert {"gelu_statistics", "mlp_backward_pointwise", "depthwise_conv_forward"} <= mode.seen
    assert all(p.grad is not None for p in model.parameters())
