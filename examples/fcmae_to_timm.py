"""Sparse pre-training with this library, fine-tuning in timm: one call loads an FCMAE encoder into a timm model.

    python -m convnextv2_kernels pretrain --data FOLDER --output run1
    python examples/fcmae_to_timm.py --checkpoint run1/encoder.safetensors --model convnextv2_atto --classes 10

Without a checkpoint it pre-trains for a few steps on random images, as a demonstration.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import convnextv2_kernels as ck


def pretrained_encoder(name: str) -> dict[str, torch.Tensor]:
    """state_dict of an FCMAE after a few steps."""
    model = ck.models.create_fcmae(name, img_size=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        loss, _, _ = model(torch.randn(4, 3, 96, 96))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="encoder.safetensors, a training checkpoint, an official file")
    parser.add_argument("--model", default="convnextv2_atto")
    parser.add_argument("--classes", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    checkpoint = options.checkpoint or pretrained_encoder(options.model)
    model = timm.create_model(options.model, num_classes=options.classes)
    print(ck.load_checkpoint(model, checkpoint))  # pre-training has no head: timm's keeps its initial values
    print(ck.fuse(model))

    # the same weights in this library's dense model: the features agree
    encoder = ck.models.create_model(options.model, features_only=True, out_indices=(3,))
    ck.load_checkpoint(encoder, checkpoint)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        (ours,), theirs = encoder(images), model.forward_features(images)
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    print(f"features of both: up to {largest:.2f}, they differ by up to {difference:.1e}")


if __name__ == "__main__":
    main()
