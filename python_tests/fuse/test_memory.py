"""The countable gains of fusing: bytes saved for backward, and no copy of a map between memory formats."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import convnextv2_kernels as ck
from convnextv2_kernels.benchmark.memory import saved_bytes

from .networks import close, output_of, small_timm_model, timm_model, transformers_model


def bytes_kept(model, images) -> int:
    alive = [images, *model.parameters(), *model.buffers()]
    return saved_bytes(lambda: output_of(model, images).square().sum(), alive)


@pytest.mark.parametrize("make", [timm_model, lambda: transformers_model((2, 2, 6, 2), (40, 80, 160, 320))])
def test_a_sixth_of_the_bytes(make):
    """The whole training step, stem, downsampling and head included, which are not fused."""
    model = make().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    plain = bytes_kept(model, images)
    ck.fuse(model)
    assert bytes_kept(model, images) * 6 <= plain


def test_what_is_kept_is_a_choice():
    """More memory, less recomputation; the results agree, in a copy as well."""
    images, kept, logits = torch.randn(2, 3, 64, 64), [], []
    for save in ("inputs", "normalized", "hidden"):
        model = small_timm_model()
        ck.fuse(model, save=save)
        model = copy.deepcopy(model)
        kept.append(bytes_kept(model, images))
        logits.append(model(images))
    assert kept[0] < kept[1] < kept[2]
    for other in logits[1:]:
        close(other, logits[0])
    ck.fuse(model, save="inputs")
    assert bytes_kept(model, images) == kept[0]
    with ck.fused(model, save="hidden"):
        assert bytes_kept(model, images) == kept[2]
    assert bytes_kept(model, images) == kept[0]
    with pytest.raises(ValueError, match="save must be one of inputs, normalized, hidden or None, got 'all'"):
        ck.fuse(small_timm_model(), save="all")


class MapCopies(TorchDispatchMode):
    """Counts the copies of tensors that have at least so many elements."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous")
        if func._schema.name in copies and out.numel() >= self.numel:
            self.seen.append(func._schema.name)
        return out


@pytest.mark.parametrize("conv_mlp", [True, False])
def test_no_copy_of_a_channels_last_map(conv_mlp):
    block = small_timm_model(conv_mlp=conv_mlp).stages[1].blocks[0]
    ck.fuse(block)
    x = torch.randn(2, 24, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    assert x.is_contiguous(memory_format=torch.channels_last)
    cotangent = torch.randn(2, 24, 9, 7).to(memory_format=torch.channels_last)
    with MapCopies(x.numel()) as copies:
        y = block(x)
        y.backward(cotangent)
    # autograd takes the gradient of a leaf without copying it, as it alone holds it
    assert copies.seen == []
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_one_copy_of_any_other_map():
    block = small_timm_model().stages[1].blocks[0]
    ck.fuse(block)
    x = torch.randn(2, 24, 9, 7)
    with MapCopies(x.numel()) as copies, torch.no_grad():
        y = block(x)
        z = block(y)
    assert len(copies.seen) == 1
    twin = copy.deepcopy(block)
    ck.unfuse(twin)
    close(z, twin(twin(x)))
