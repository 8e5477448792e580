"""Named masks of the suite: every kind of batch that a layout must support."""

from __future__ import annotations

import torch
from torch import Tensor

from convnextv2_kernels import PatchLayout

# grid, and how many patches each image keeps
_COUNTS = {
    "uniform": ((3, 3), (4, 4, 4)),
    "ragged": ((3, 3), (5, 1, 7)),
    "empty_image": ((2, 3), (3, 0, 6)),
    "none_visible": ((2, 2), (0, 0)),
    "all_visible": ((2, 3), (6, 6)),
    "one_patch": ((3, 3), (0, 1)),
    "one_cell": ((1, 1), (1,)),
    "non_square": ((2, 5), (4, 4)),
    "batch_0": ((3, 3), ()),
}
LAYOUTS = tuple(_COUNTS)
_COUNTS["six_of_nine"] = ((3, 3), (6, 6))  # of bench/gate, no case of the suite
# not a multiple of any tile, and a map smaller than every kernel
DENSE_SIZES = {"dense_7x7": (7, 7), "dense_14x9": (14, 9), "dense_28x30": (28, 30), "dense_1x5": (1, 5)}


def make_mask(name: str, seed: int = 0) -> Tensor:
    """``[N, Gh, Gw]`` bool, True = hidden; where there is more than one choice, the kept patches are random."""
    (gh, gw), counts = _COUNTS[name]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(len(counts), gh * gw, dtype=torch.bool)
    for image, kept in enumerate(counts):
        mask[image, torch.randperm(gh * gw, generator=generator)[:kept]] = False
    return mask.view(len(counts), gh, gw)


def make_layout(name: str, device: str = "cpu", seed: int = 0) -> PatchLayout:
    return PatchLayout.from_mask(make_mask(name, seed).to(device))
