"""A kernel to be timed, and the shapes of the models' stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .operators import Draw

CONV_TARGETS = {8: {"forward": 0.45, "weight_grad": 0.35}, 4: {"forward": 0.55, "weight_grad": 0.55}}
ROW_TARGET = 0.85
# below this least time a launch costs as much as the bytes, and a share of bandwidth says nothing
SHARE_FROM_US = 10.0


@dataclass(frozen=True)
class Case:
    """``make(draw, sets)`` returns one call for each set of buffers.

    Attributes:
        bytes: fewest bytes of one call (:mod:`bytes_moved`).
        target: share of copy bandwidth it should reach with cold buffers, None where only the time counts.
        peer: PyTorch's own kernel, for comparison.
    """

    key: str
    bytes: int
    make: Callable[[Draw, int], list[Callable[[], object]]]
    target: float | None = None
    peer: bool = False


@dataclass(frozen=True)
class StageShape:
    """One stage of a model on one batch: packed patches ``[images * kept, side, side, width]``."""

    model: str
    side: int
    width: int
    images: int
    grid: int = 7

    @property
    def kept(self) -> int:
        """Visible patches of an image: ``int(L * 0.4)``, as FCMAE keeps."""
        return int(self.grid**2 * (1 - 0.6))

    @property
    def slots(self) -> int:
        return self.images * self.kept

    @property
    def rows(self) -> int:
        return self.slots * self.side**2

    @property
    def all_rows(self) -> int:
        """Rows of the dense map."""
        return self.images * (self.grid * self.side) ** 2

    @property
    def label(self) -> str:
        return f"{self.model} n{self.images} s{self.side} c{self.width}"


DRY_STAGES = tuple(StageShape("dry", side, width, 1, 2) for side, width in ((8, 8), (4, 8), (2, 16), (1, 16)))


def stage_shapes(model: str, images: int) -> tuple[StageShape, ...]:
    """The four stages of ``convnextv2_<model>`` at 224 px."""
    from convnextv2_kernels.models import get_config

    dims = get_config(f"convnextv2_{model}").dims
    return tuple(StageShape(model, side, width, images) for side, width in zip((8, 4, 2, 1), dims, strict=True))
