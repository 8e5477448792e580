"""Pre-training through the public API on Triton's kernels: the losses of the reference, step for step."""

from __future__ import annotations

import pytest
import torch

import convnextv2_kernels as ck

from .available import needs_kernels

STEPS = 2


def losses(backend: str, device: str) -> list[float]:
    """FCMAE of atto's widths, interpreted with one block a stage, on 64-pixel images; AdamW, a new mask each step."""
    from convnextv2_kernels.backends import triton

    torch.manual_seed(0)
    depths = (1, 1, 1, 1) if triton.INTERPRETED else (2, 2, 6, 2)
    model = ck.models.FCMAE(depths, (40, 80, 160, 320), img_size=64, decoder_embed_dim=32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        images = torch.randn(2, 3, 64, 64, generator=generator).to(device)
        mask = ck.random_mask(2, (2, 2), 0.5, generator=generator).to(device)
        with ck.use_backend(backend):
            loss = model(images, mask)[0]
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.thorough
@needs_kernels
def test_losses_are_those_of_the_reference():
    from convnextv2_kernels.backends import triton

    expected = losses("reference", triton.DEVICE)
    assert losses("triton", triton.DEVICE) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == STEPS, "the steps changed something"
