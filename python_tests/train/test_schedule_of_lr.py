"""The learning rate by step, alone and in a run against a loop written by hand: warm-up, floor, decay, clipping."""

import dataclasses
import json
import math

import pytest
import torch
from helpers.training import CONFIG, run_tiny, tiny_model

from convnextv2_kernels.data.images import CropDataset, StepSampler, normalize
from convnextv2_kernels.data.rng import MASK, torch_stream
from convnextv2_kernels.layout import random_mask
from convnextv2_kernels.train.optim import lr_at_step

SETTINGS = {
    "precision": "float64",
    "clip_grad": 5e-3,
    "ema_decay": 0.7,
    "min_lr": 2e-4,
    "betas": (0.8, 0.9),
    "lr": 2e-3,
    "weight_decay": 0.3,
}


def by_hand(sources, spared):
    """Nothing of the loop but its random streams: order of the images, crops and masks."""
    config = dataclasses.replace(CONFIG, num_images=len(sources), **SETTINGS)
    crops = CropDataset(sources, config.img_size, config.seed, config.hflip)
    model = tiny_model().double()
    groups = [
        {"params": [p for n, p in model.named_parameters() if spared(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if not spared(n, p)], "weight_decay": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.8, 0.9), foreach=False)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    per_epoch = len(sources) // 2
    total, warm, losses = 3 * per_epoch, per_epoch // 2, []
    order = list(StepSampler(config.num_images, config.batch_size, config.seed, 0, total))
    for step in range(total):
        share = (step - warm) / (total - warm)
        lr = 2e-3 * step / warm if step < warm else 2e-4 + 1.8e-3 * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = normalize(torch.stack([crops[key].image for key in order[step]])).double()
        mask = random_mask(2, config.grid, ratio=0.6, generator=torch_stream(config.seed, MASK, step))
        optimizer.zero_grad()
        loss = model(images, mask)[0]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5e-3)
        optimizer.step()
        losses.append((loss.item(), lr, float(norm)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name] = 0.7 * average[name] + 0.3 * p
    return losses, model.state_dict(), average


@pytest.mark.parametrize("decay", ["standard", "official"])
def test_run_is_that_of_a_loop_by_hand(tmp_path, sources, decay):
    def spared(name, parameter):
        last = name.rpartition(".")[2]
        more = last in ("gamma", "beta", "mask_token") if decay == "standard" else False
        return parameter.ndim <= 1 or last == "bias" or more

    run_tiny(tmp_path, sources, decay=decay, **SETTINGS)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses, weights, average = by_hand(sources, spared)
    ours = torch.tensor([[r["loss"], r["lr"], r["grad_norm"]] for r in records], dtype=torch.float64)
    theirs = torch.tensor(losses, dtype=torch.float64)
    assert (theirs[:, 2] > 5e-3).sum() > 6  # clipped
    # float64: fused and plain AdamW round differently, a few hundred times a step, for twelve steps
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-18)
    state = torch.load(tmp_path / f"checkpoint-{len(records)}.pt")
    for key, expected in (("model", weights), ("model_ema", average)):
        for name, tensor in expected.items():
            # AdamW divides by a root of squares: where both are roundings, the quotient is not
            torch.testing.assert_close(state[key][name], tensor, rtol=1e-7, atol=1e-9, msg=f"{key} {name}")


def test_floor_of_the_schedule():
    rates = [lr_at_step(step, 50, 5, 1.0, 0.1) for step in range(51)]
    assert rates[0] == 0 and rates[5] == 1.0 and rates[50] == pytest.approx(0.1) and min(rates[5:]) >= 0.1 - 1e-12
    assert rates[27] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 45)))
