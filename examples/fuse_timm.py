"""One line in a training script: a timm ConvNeXt V2 on fused kernels.

    python examples/fuse_timm.py                       # random images instead of a data loader
    python examples/fuse_timm.py --model convnextv2_tiny --batch-size 16 --compare

``--compare`` first runs the same steps without that line, to show that it changes the time and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import convnextv2_kernels as ck


def train(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[float], float]:
    """A plain PyTorch loop. Returns the losses and the seconds per step, without the first (warm-up) step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses, start = [], 0.0
    for step, (images, labels) in enumerate(batches):
        if step == 1:
            start = time.perf_counter()
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - start) / max(1, len(batches) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_atto")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file to save the trained weights to")
    parser.add_argument("--compare", action="store_true", help="also train without the fused kernels")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (options.batch_size, 3, options.img_size, options.img_size)
    batches = [
        (torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)) for _ in range(options.steps)
    ]
    model = timm.create_model(options.model, num_classes=10).to(device)
    twin = copy.deepcopy(model)

    print(ck.fuse(model))  # the line; it names the blocks that could not be fused

    losses, seconds = train(model, batches)
    print(f"fused:     {1e3 * seconds:7.1f} ms per step, losses {', '.join(f'{loss:.4f}' for loss in losses)}")
    if options.compare:
        plain_losses, plain_seconds = train(twin, batches)
        text = ", ".join(f"{loss:.4f}" for loss in plain_losses)
        print(f"not fused: {1e3 * plain_seconds:7.1f} ms per step, losses {text}")
    ck.unfuse(model)  # undo it: the same parameters in plain timm code
    if options.output is not None:
        torch.save(model.state_dict(), options.output)
        print(f"saved {options.output}, a timm checkpoint like any other")


if __name__ == "__main__":
    main()
