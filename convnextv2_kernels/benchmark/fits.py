"""Which models fit the machine: memory a comparison needs, foretold without allocating any of it."""

from __future__ import annotations

import torch

from ..models import get_config
from . import memory
from .baseline import PATCH, MaskedDenseFCMAE, Variant

GIB = 1 << 30
# Of what is saved for backward, for temporaries beside it: 1.04 to 1.14 were measured for base and tiny on a CPU.
TEMPORARIES = 1.25
GATE_IMAGES = 2


def meta_network(model_name: str, variant: Variant) -> MaskedDenseFCMAE:
    """The masked dense network without memory of its own."""
    config = get_config(model_name)
    with torch.device("meta"):
        return MaskedDenseFCMAE(config.depths, config.dims, variant=variant)


def dense_bytes(model_name: str, batch: int, img_size: int, variant: Variant) -> tuple[int, int]:
    """(bytes of the parameters, bytes the masked dense step saves for backward), in float32."""
    model = meta_network(model_name, variant)
    parameters = sum(p.nbytes for p in model.parameters())
    with torch.device("meta"):
        images = torch.empty(batch, 3, img_size, img_size)
        mask = torch.empty(batch, img_size // PATCH, img_size // PATCH, dtype=torch.bool)
    kept = memory.saved_bytes(lambda: model(images, mask)[0], [*model.parameters(), images, mask])
    return parameters, kept


def needed_bytes(model_name: str, batch: int, img_size: int, variant: Variant) -> int:
    """Most memory that gate, timing and peak measurement of one model need, in float32.

    All arms share their weights, but for a few convolutions.
    """
    parameters, kept = dense_bytes(model_name, batch, img_size, variant)
    step = parameters + TEMPORARIES * kept  # gradients, activations
    # float64 weights, gradients and activations of a few images
    gate = 4 * parameters + 2 * TEMPORARIES * kept * min(GATE_IMAGES, batch) / batch
    # weights here, and weights once more in the process whose peak is measured
    return int(parameters + max(gate, step + parameters))


def why_not(needed: int, available: int | None) -> str | None:
    """Why a model does not fit, None if it does or nobody can tell."""
    if available is None or needed <= available:
        return None
    return f"needs about {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB are available"


def parameter_count(model_name: str) -> int:
    """Parameters of FCMAE of this size."""
    return sum(p.numel() for p in meta_network(model_name, Variant("channels_last", "conv1x1")).parameters())
