"""The moving average of the weights: against timm, over a resume, and back bit for bit."""

import copy

import pytest
import torch
from helpers.reference_models import timm
from helpers.training import run_tiny, tiny_model

from convnextv2_kernels.train.optim import Average


def stir(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_average_is_that_of_timm():
    model = tiny_model()
    average = Average(model, 0.9)
    theirs = timm.utils.ModelEmaV3(copy.deepcopy(model), decay=0.9, foreach=False)
    for seed in range(5):
        stir(model, seed)
        average.update(model)
        theirs.update(model)
    for name, expected in theirs.module.named_parameters():
        torch.testing.assert_close(average.tensors[name], expected.detach())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.applied(model):
        for ours, expected in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(ours, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_average_survives_a_resume_bitwise(tmp_path, sources):
    for name, stops in (("whole", (None,)), ("resumed", (3, None))):
        (tmp_path / name).mkdir()
        for stop in stops:
            run_tiny(tmp_path / name, sources, max_steps=stop, ema_decay=0.7)
    whole, resumed = (torch.load(tmp_path / name / "checkpoint-12.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed["model_ema"][name]) for name, tensor in whole["model_ema"].items())
    assert any(not torch.equal(tensor, whole["model"][name]) for name, tensor in whole["model_ema"].items())


def test_average_gives_back_the_weights_bit_for_bit_after_an_error():
    model = tiny_model()
    average = Average(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.1)
    average.update(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(RuntimeError, match="evaluation"), average.applied(model):
        assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())
        raise RuntimeError("evaluation")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(tensor, held[name]) for name, tensor in average.tensors.items())
