"""FCMAE pre-training with the whole step, optimizer included, in one CUDA graph.

    python examples/graphed_pretraining.py --steps 100

A graph replays the same kernels on the same memory: the batch size is fixed, and the images are copied in. Every replay
draws new masks. Random images replace a data loader.
"""

from __future__ import annotations

import argparse
import time

import torch

import convnextv2_kernels as ck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convnextv2_atto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA graph needs a CUDA device, and PyTorch sees none here")

    model = ck.models.create_fcmae(options.model).cuda()
    lr = torch.tensor(1.5e-4, device="cuda")  # a tensor, so that a schedule can change it between replays
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), capturable=True)
    images = torch.randn(options.batch_size, 3, 224, 224, device="cuda")
    step = ck.make_graphed_step(model, images, optimizer=optimizer, autocast=torch.bfloat16)

    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(options.steps):
        loss = step(images)  # in training: the next batch of a data loader
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"loss {float(loss):.4f}, {options.steps * options.batch_size / seconds:.0f} images/s")


if __name__ == "__main__":
    main()
