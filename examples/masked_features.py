"""Features of the visible patches of one image: hidden pixels cost nothing and affect nothing.

    python examples/masked_features.py --image photo.jpg --model convnextv2_tiny --checkpoint tiny_fcmae.pt

Without a checkpoint the weights are random. Any format of docs/checkpoints.md works.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import convnextv2_kernels as ck
from convnextv2_kernels.data.decoding import open_rgb

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def load_image(path: Path, size: int) -> torch.Tensor:
    """``[1, 3, size, size]``, normalised as ImageNet models expect."""
    image = open_rgb(path).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return ((pixels - MEAN) / STD).permute(2, 0, 1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="weights of any known format")
    parser.add_argument("--model", default="convnextv2_atto")
    parser.add_argument("--img-size", type=int, default=224, help="a multiple of 32")
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = ck.models.create_fcmae(options.model, img_size=options.img_size).eval()
    if options.checkpoint is not None:
        print(ck.load_checkpoint(model, options.checkpoint))
    images = load_image(options.image, options.img_size)
    mask = ck.random_mask(1, model.grid, ratio=options.mask_ratio)  # True = hidden
    if mask.all():
        parser.error(f"--mask-ratio {options.mask_ratio:g} hides all {mask.numel()} patches")

    with torch.no_grad():
        features, layout = model.encode(images, mask)
        images[:, :, mask[0].repeat_interleave(32, 0).repeat_interleave(32, 1)] = torch.nan
        again, _ = model.encode(images, mask)
    print(f"{layout.num_patches} of {mask.numel()} patches are visible; features {list(features.shape)}")
    print("hidden pixels set to NaN change nothing:", torch.equal(features, again))
    dense = ck.ops.scatter_patches(features, layout)
    print(f"as a map with zeros where hidden: {list(dense.shape)} (N, H, W, C)")


if __name__ == "__main__":
    main()
