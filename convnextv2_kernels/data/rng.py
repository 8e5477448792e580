"""Random streams that are pure functions of (seed, purpose, counters).

Nothing in a run draws from a stream whose state depends on what was drawn before it, which is why neither a resume in
mid-epoch, nor the number of data-loading workers, nor that of processes can change a number.
"""

import numpy as np
import torch

AUGMENT = 1  # counters: epoch, index of the image
ORDER = 2  # counters: epoch
MASK = 3  # counters: step
MASK_EVAL = 4  # counters: none, or the image's place
MIX = 5  # counters: step, first image of the micro-batch in the batch
DROP_PATH = 6  # counters: step
SPLIT = 7  # counters: digest of the class and the names of its images


def numpy_stream(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """Return the NumPy generator of one (seed, purpose, counters)."""
    return np.random.default_rng([seed, purpose, *counters])


def torch_stream(seed: int, purpose: int, *counters: int) -> torch.Generator:
    """Return the CPU torch generator of one (seed, purpose, counters)."""
    state = np.random.SeedSequence([seed, purpose, *counters]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
