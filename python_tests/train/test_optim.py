import itertools
import math

import pytest
import torch
from helpers.training import tiny_model

from convnextv2_kernels.train import recipes
from convnextv2_kernels.train.optim import lr_at_step, make_optimizer, parameter_groups, scaled_lr, set_lr


def test_only_weights_of_maps_are_decayed():
    model = tiny_model()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, undecayed = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and undecayed["weight_decay"] == 0
    kept = {names[id(p)] for p in undecayed["params"]}
    assert {"mask_token", "encoder.stages.0.0.grn.gamma", "decoder.0.grn.beta"} <= kept
    assert {"proj.bias", "encoder.stages.2.0.norm.weight"} <= kept
    shrunk = {names[id(p)] for p in decayed["params"]}
    assert {"encoder.stages.0.0.dwconv.weight", "pred.weight", "decoder.0.pwconv1.weight"} <= shrunk
    assert all(n.endswith(".weight") and ".norm." not in n for n in shrunk)
    assert len(shrunk) + len(kept) == len(names)


def test_optimizer_is_the_official_one():
    config = recipes.resolve(recipes.PRETRAIN, "default", {}).values
    groups = make_optimizer(parameter_groups(tiny_model(), 0.05), 1e-3, config["betas"]).param_groups
    assert all(group["betas"] == (0.9, 0.95) for group in groups)


def test_schedule():
    rates = [lr_at_step(step, 100, 10, 2.0) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 1.0 and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90)) and rates[100] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert lr_at_step(0, 100, 0, 2.0) == 2.0


def test_rate_is_scaled_to_256_images():
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_official_decay_takes_what_ours_spares():
    model = tiny_model()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in parameter_groups(model, 0.05, "official")[0]["params"]}
    ours = {names[id(p)] for p in parameter_groups(model, 0.05)[0]["params"]}
    more = decayed - ours
    assert ours < decayed and {"mask_token", "encoder.stages.0.0.grn.gamma", "decoder.0.grn.beta"} <= more
    assert all(name == "mask_token" or ".grn." in name for name in more)


def test_layers_scale_the_rate():
    weight = torch.nn.Parameter(torch.ones(2))
    other = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "weight_decay": 0.0, "lr_scale": 0.25}, {"params": [other], "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, 1.0, (0.9, 0.999))
    set_lr(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.8]
