"""Which images an analysis looks at, and their decoding: centred crops, in a fixed order, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from ..data.images import Source, describe, load_crop
from ..data.rng import ORDER, numpy_stream
from ..errors import UserError

AHEAD = 64  # images decoded before they are needed


def spread_over_folders(names: Sequence[str], seed: int) -> list[int]:
    """Order in which to take ``names``, POSIX paths: one of each top-level folder by turns, at random within it.

    So the first n are of as many classes as there are, as Figure 4 asks for, where a folder is a class. A pure function
    of (seed, names).
    """
    folders: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        folders.setdefault(name.partition("/")[0] if "/" in name else "", []).append(index)
    shuffled = [
        [members[i] for i in numpy_stream(seed, ORDER, number).permutation(len(members))]
        for number, members in enumerate(folders.values())
    ]
    return [index for turn in zip_longest(*shuffled) for index in turn if index is not None]


@dataclass
class Crops:
    """Batches of the largest centred crops of ``sources``, resized to ``size`` = (H, W).

    A source that cannot be read is left out and the next one takes its place; ``failures`` holds (name, reason).
    ``limit``: how many images at most.
    """

    sources: Sequence[Source]
    size: tuple[int, int]
    batch_size: int
    limit: int | None = None
    workers: int = 1
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield pixels, uint8 ``[N, H, W, 3]``, and the indices of their sources.

        Raises UserError where no source can be read.
        """
        self.failures.clear()
        pixels, indices, done = [], [], 0
        for index, crop in self._decoded():
            pixels.append(crop)
            indices.append(index)
            done += 1
            last = done == self.limit
            if last or len(pixels) == self.batch_size:
                yield torch.stack(pixels), indices
                pixels, indices = [], []
            if last:
                return
        if pixels:
            yield torch.stack(pixels), indices
        if not done:
            first = f" (the first: {': '.join(self.failures[0])})" if self.failures else ""
            raise UserError(f"none of the {len(self.sources)} images can be read{first}.")

    def _decoded(self) -> Iterator[tuple[int, Tensor]]:
        waiting, queue = deque(), iter(enumerate(self.sources))
        pool = ThreadPoolExecutor(max(1, self.workers))
        try:
            while True:
                while len(waiting) < AHEAD and (one := next(queue, None)) is not None:
                    waiting.append((one[0], pool.submit(load_crop, one[1], self.size, None)))
                if not waiting:
                    return
                index, future = waiting.popleft()
                try:
                    crop = future.result()
                except Exception as error:  # Pillow's decoders raise whatever a broken file trips.
                    self.failures.append((str(self.sources[index]), describe(error)))
                else:
                    yield index, crop
        finally:
            pool.shutdown(cancel_futures=True)
