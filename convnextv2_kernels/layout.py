"""The visible patches of a batch, and their positions in the packed tensors."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .tracing import exporting, for_any_input

_INT32_MAX = 2**31 - 1
_MOST_REACH = 255  # of neighbour tables, as the CUDA operator has it
_FIELDS = ("grid", "slot_of_patch", "patch_of_slot", "image_offsets", "patches_per_image")


class LayoutKernels(Protocol):
    """The two kernels that build a layout in one launch each, with the same results as the methods below."""

    def builds_layouts(self, device: torch.device) -> bool:
        """Whether they run on a device."""

    def layout_from_kept(self, ids: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]: ...

    def neighbour_slots(
        self, slot_of_patch: Tensor, patch_of_slot: Tensor, grid: tuple[int, int], radius: int
    ) -> Tensor: ...


# By device type; ``backends`` registers the available ones.
KERNELS: dict[str, LayoutKernels] = {}


def _kernels_for(device: torch.device) -> LayoutKernels | None:
    kernels = None if exporting() else KERNELS.get(device.type)
    return kernels if kernels is not None and kernels.builds_layouts(device) else None


class PatchLayout:
    """Index of the visible patches of a batch of masked images.

    Features are packed as ``[P, s, s, C]``: one slot per visible patch, slots sorted by image, and ``s`` the
    patch side at the current stage. One layout serves every stage, because a mask is made of whole patches.

    Attributes:
        grid: ``(Gh, Gw)``, patches per column and per row of an image.
        num_images: N. num_patches: P, the number of visible patches of the batch.
        patches_per_image: P / N when every image keeps the same number of patches, else ``None`` (ragged).
        slot_of_patch: ``[N, Gh*Gw]`` int32, the slot of each patch, -1 where hidden.
        patch_of_slot: ``[P]`` int32, ``n*Gh*Gw + row*Gw + col`` of each slot.
        image_offsets: ``[N+1]`` int32, slots ``image_offsets[n]:image_offsets[n+1]`` belong to image n.

    Build one with :meth:`from_mask` (any mask) or :meth:`from_kept` (equal counts, never a device sync). Kernels trust
    the index tensors on a GPU, so a layout made of given ones, or unpickled, compares them (one sync on a GPU), and no
    attribute can be replaced.

    Raises:
        TypeError, ValueError: a field of another type, shape, dtype or device, or index tensors that contradict each
            other.
        AttributeError: an attribute is replaced.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        slot_of_patch: Tensor,
        patch_of_slot: Tensor,
        image_offsets: Tensor,
        patches_per_image: int | None,
    ):
        grid = _check_grid(grid)
        _check_fields(grid, slot_of_patch, patch_of_slot, image_offsets, patches_per_image)
        if _can_be_read(slot_of_patch):
            _check_contents(grid, slot_of_patch, patch_of_slot, image_offsets, patches_per_image)
        self._fill(grid, slot_of_patch, patch_of_slot, image_offsets, patches_per_image)

    @classmethod
    def _built(cls, *fields) -> PatchLayout:
        """A layout of index tensors that were made to agree."""
        layout = cls.__new__(cls)
        layout._fill(*fields)
        return layout

    def _fill(
        self,
        grid: tuple[int, int],
        slot_of_patch: Tensor,
        patch_of_slot: Tensor,
        image_offsets: Tensor,
        patches_per_image: int | None,
    ) -> None:
        self.grid = grid
        self.slot_of_patch = slot_of_patch
        self.patch_of_slot = patch_of_slot
        self.image_offsets = image_offsets
        self.patches_per_image = patches_per_image
        self.num_images = slot_of_patch.shape[0]
        self.num_patches = patch_of_slot.shape[0]
        self._neighbours: dict[int, Tensor] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(
                f"{name} of a PatchLayout cannot be replaced: other patches need a layout of their own"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or any(name not in state for name in _FIELDS):
            raise ValueError(f"the state of a PatchLayout must hold {', '.join(_FIELDS)}, got something else")
        PatchLayout.__init__(self, *(state[name] for name in _FIELDS))

    @classmethod
    def from_mask(cls, mask: Tensor) -> PatchLayout:
        """Layout of any mask ``[N, Gh, Gw]`` bool, True = hidden; counts may differ and may be zero.

        Reads the number of visible patches back from the device (one sync on a GPU). If every image has the same
        number, the layout is uniform nevertheless. In a program for other masks (``torch.export``,
        ``torch.onnx.export``, ``torch.jit.trace``) it is ragged, and P is a size that the program computes.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor of shape [N, Gh, Gw], got {type(mask).__name__}")
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be a bool tensor of shape [N, Gh, Gw] (True = hidden), got {mask.dtype} of shape "
                f"{list(mask.shape)}"
            )
        _check_strided(mask, "mask")
        if mask.is_meta:
            raise ValueError("mask lies on meta, without values to count; from_kept builds a layout without them")
        n, gh, gw = mask.shape
        _check_grid((gh, gw))
        _check_size(n, gh, gw)
        visible = ~mask.reshape(n, gh * gw)
        flat = visible.reshape(-1)
        counts = visible.sum(dim=1)
        offsets = torch.zeros(n + 1, dtype=torch.int32, device=mask.device)
        offsets[1:] = counts.cumsum(0)
        slots = torch.where(flat, flat.cumsum(0, dtype=torch.int64) - 1, -1).to(torch.int32)
        uniform = None
        if not for_any_input():
            per_image = counts.tolist()
            uniform = per_image[0] if per_image and min(per_image) == max(per_image) else None
        patches = flat.nonzero().squeeze(1).to(torch.int32)
        return cls._built((gh, gw), slots.view(n, gh * gw), patches, offsets, uniform)

    @classmethod
    def from_kept(cls, ids: Tensor, grid: tuple[int, int]) -> PatchLayout:
        """Layout of ``ids [N, K]`` int64, the kept patches of each image (any order, no repeats), no device sync.

        On a CPU the ids are checked. On a GPU, where a check would need a sync, an id out of range is ignored and a
        repeated one is undefined behaviour.
        """
        gh, gw = _check_grid(grid)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
            got = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids must be an int64 tensor of shape [N, K], got {got}")
        _check_strided(ids, "ids")
        n, kept = ids.shape
        total = gh * gw
        _check_size(n, gh, gw)
        if kept > total:
            raise ValueError(f"ids keeps {kept} patches per image, but grid {gh}x{gw} has only {total}")
        native = _kernels_for(ids.device)
        if native is None:
            ids = ids.sort(dim=1).values
        recorded = torch.compiler.is_compiling() or for_any_input() or type(ids) is not Tensor  # or without data
        if ids.device.type == "cpu" and not recorded and ids.numel():
            if int(ids.min()) < 0 or int(ids.max()) >= total:
                raise ValueError(
                    f"ids must lie in 0..{total - 1} for grid {gh}x{gw}, got values from {int(ids.min())} to "
                    f"{int(ids.max())}"
                )
            if kept > 1 and bool((ids[:, 1:] == ids[:, :-1]).any()):
                raise ValueError("ids must not repeat a patch within an image, got at least one repeated id")
        device = ids.device
        if native is not None:
            return cls._built((gh, gw), *native.layout_from_kept(ids.contiguous(), (gh, gw)), kept)
        flat = (ids + torch.arange(n, device=device)[:, None] * total).reshape(-1)
        slots = torch.full((n * total,), -1, dtype=torch.int32, device=device)
        slots = slots.scatter(0, flat, torch.arange(n * kept, dtype=torch.int32, device=device))
        offsets = torch.arange(n + 1, dtype=torch.int32, device=device) * kept
        return cls._built((gh, gw), slots.view(n, total), flat.to(torch.int32), offsets, kept)

    @property
    def device(self) -> torch.device:
        return self.patch_of_slot.device

    @property
    def image_of_slot(self) -> Tensor:
        """``[P]`` int32, the image each slot belongs to."""
        return self.patch_of_slot // (self.grid[0] * self.grid[1])

    def neighbour_slots(self, radius: int) -> Tensor:
        """``[P, (2*radius+1)^2]`` int32: slot of each patch around a slot, row-major from the upper left, -1 where
        the neighbour is hidden or outside the image. Cached. Radius 0 is the slot itself."""
        if not isinstance(radius, int) or not 0 <= radius <= _MOST_REACH:
            raise ValueError(f"radius must be an integer from 0 to {_MOST_REACH}, got {radius!r}")
        table = self._neighbours.get(radius)
        if table is None:
            table = self._build_neighbours(radius)
            self._neighbours[radius] = table
        return table

    def conv_neighbours(self, kernel_size: int, side: int) -> Tensor:
        """The neighbours that a K x K convolution of patches of ``side`` sites reaches, see :meth:`neighbour_slots`."""
        return self.neighbour_slots(-(-(kernel_size // 2) // side))

    def _build_neighbours(self, radius: int) -> Tensor:
        gh, gw = self.grid
        native = _kernels_for(self.device)
        if native is not None:
            return native.neighbour_slots(self.slot_of_patch, self.patch_of_slot, self.grid, radius)
        width = 2 * radius + 1
        padded_w = gw + 2 * radius
        padded = torch.nn.functional.pad(self.slot_of_patch.view(self.num_images, gh, gw), (radius,) * 4, value=-1)
        patch = self.patch_of_slot.to(torch.int64)
        image = patch // (gh * gw)
        row = (patch // gw) % gh
        corner = (image * (gh + 2 * radius) + row) * padded_w + patch % gw
        step = torch.arange(width, device=self.device)
        window = (step[:, None] * padded_w + step[None, :]).reshape(-1)
        return padded.reshape(-1)[corner[:, None] + window[None, :]]

    def hidden_mask(self) -> Tensor:
        """``[N, Gh, Gw]`` bool, True = hidden."""
        return (self.slot_of_patch < 0).view(self.num_images, *self.grid)

    def complement(self) -> PatchLayout:
        """Layout of the hidden patches of the same batch; without a sync if this layout is uniform."""
        if self.patches_per_image is None:
            return PatchLayout.from_mask(~self.hidden_mask())
        hidden = self.grid[0] * self.grid[1] - self.patches_per_image
        order = (self.slot_of_patch >= 0).to(torch.int8).argsort(dim=1, stable=True)
        return PatchLayout.from_kept(order[:, :hidden], self.grid)

    def to(self, device: torch.device | str) -> PatchLayout:
        """The same layout with its tensors on ``device``; they are compared first if they lie on a CPU."""
        fields = (self.grid, self.slot_of_patch, self.patch_of_slot, self.image_offsets, self.patches_per_image)
        if self.device.type == "cpu" and _can_be_read(self.slot_of_patch):
            _check_contents(*fields)
        return PatchLayout._built(*(f.to(device) if isinstance(f, Tensor) else f for f in fields))

    def __repr__(self) -> str:
        kept = "ragged" if self.patches_per_image is None else f"{self.patches_per_image} per image"
        return (
            f"PatchLayout(grid={self.grid}, num_images={self.num_images}, num_patches={self.num_patches} "
            f"({kept}), device={self.device})"
        )


def num_kept(grid: tuple[int, int], ratio: float) -> int:
    """Patches that FCMAE keeps visible per image: ``int(L * (1 - ratio))``, 19 of 49 at ratio 0.6."""
    gh, gw = _check_grid(grid)
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie between 0 and 1 (the share of hidden patches), got {ratio}")
    return int(gh * gw * (1 - ratio))


def mask_fault(
    grid: tuple[int, int],
    ratio: float,
    patch_size: int = 32,
    ratio_name: str = "mask_ratio",
    size_name: str = "img_size",
) -> str | None:
    """Why pre-training under masks of this ratio would learn nothing, or None.

    The encoder learns from what is visible, the loss is on what is hidden: a mask needs a patch of each kind. The
    sentence calls the arguments by the names given here, and says which values would do.

    Args:
        grid: patches per column and per row of an image, ``patch_size`` pixels each.
        ratio: share of hidden patches, see :func:`num_kept`.
    """
    gh, gw = _check_grid(grid)
    patches, kept = gh * gw, num_kept(grid, ratio)
    if 0 < kept < patches:
        return None
    size = f"{gh * patch_size}x{gw * patch_size} pixels"
    side = next((n for n in range(2, 100) if 0 < num_kept((n, n), ratio) < n * n), None)
    if patches == 1:
        return (
            f"the only patch of {size} is either hidden or visible, which leaves nothing to see or nothing to predict; "
            f"expected {size_name} of at least {patch_size * (side or 2)}"
            + (f" for {ratio_name} {ratio:g}" if side else "")
        )
    if kept:
        return (
            f"{ratio_name} {ratio:g} hides none of the {patches} patches of {size}, which leaves nothing to predict; "
            f"expected {ratio_name} above 0"
        )
    # Found by trial, because the product is rounded: 5 patches at 0.8 keep none.
    most = next(percent for percent in range(99, 0, -1) if num_kept(grid, percent / 100)) / 100
    return (
        f"{ratio_name} {ratio:g} hides all {patches} patches of {size}, which leaves nothing to see; expected "
        f"{ratio_name} of at most {most:g} at this size"
        + (f", or {size_name} of at least {patch_size * side} at this ratio" if side else "")
    )


def random_kept(
    num_images: int,
    grid: tuple[int, int],
    ratio: float = 0.6,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``[N, K]`` int64 ids of the patches that stay visible, uniform without replacement, K = :func:`num_kept`.

    K may be 0 or all patches, which :func:`mask_fault` calls useless for pre-training.
    """
    kept = num_kept(grid, ratio)
    if not _is_int(num_images) or num_images < 0:
        raise ValueError(f"num_images must be an integer >= 0, got {num_images!r}")
    noise = torch.rand(num_images, grid[0] * grid[1], generator=generator, device=device)
    return noise.argsort(dim=1)[:, :kept]


def random_mask(
    num_images: int,
    grid: tuple[int, int],
    ratio: float = 0.6,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``[N, Gh, Gw]`` bool mask, True = hidden, that keeps :func:`num_kept` random patches in each image.

    That number may be 0: a mask without visible patches is valid, but nothing can be learned from it. ``FCMAE``,
    ``pretrain``, ``bench`` and ``analyze reconstruct`` refuse such ratios.
    """
    ids = random_kept(num_images, grid, ratio, generator, device)
    mask = torch.ones(num_images, grid[0] * grid[1], dtype=torch.bool, device=ids.device)
    return mask.scatter(1, ids, False).view(num_images, *grid)


def _is_int(value: object) -> bool:
    if isinstance(value, Tensor):  # what torch.jit.trace makes of a size
        return for_any_input()
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(_is_int(side) and side >= 1 for side in grid):
        got = tuple(grid) if isinstance(grid, (tuple, list)) else grid
        raise ValueError(f"grid must be two positive integers (rows, columns of patches), got {got!r}")
    return int(grid[0]), int(grid[1])


def _check_strided(t: Tensor, name: str) -> None:
    if t.layout is not torch.strided or t.is_nested:
        kind = "a nested tensor" if t.is_nested else str(t.layout)
        raise TypeError(f"{name} is {kind}, expected a dense tensor")


def _check_fields(
    grid: tuple[int, int],
    slot_of_patch: Tensor,
    patch_of_slot: Tensor,
    image_offsets: Tensor,
    patches_per_image: int | None,
) -> None:
    """Types, shapes, dtypes and devices."""
    tables = {"slot_of_patch": slot_of_patch, "patch_of_slot": patch_of_slot, "image_offsets": image_offsets}
    for name, table in tables.items():
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(table).__name__}")
        _check_strided(table, name)
        if table.dtype != torch.int32 or not table.is_contiguous():
            raise ValueError(f"{name} must be a contiguous int32 tensor, got {table.dtype} of strides {table.stride()}")
        if table.device != slot_of_patch.device:
            raise ValueError(f"{name} lies on {table.device}, expected the device of slot_of_patch")
    total = grid[0] * grid[1]
    if slot_of_patch.dim() != 2 or slot_of_patch.shape[1] != total:
        raise ValueError(f"slot_of_patch has shape {list(slot_of_patch.shape)}, expected [N, {total}]")
    images = slot_of_patch.shape[0]
    _check_size(images, *grid)
    if patch_of_slot.dim() != 1:
        raise ValueError(f"patch_of_slot has shape {list(patch_of_slot.shape)}, expected [P]")
    if tuple(image_offsets.shape) != (images + 1,):
        raise ValueError(f"image_offsets has shape {list(image_offsets.shape)}, expected [{images + 1}]")
    slots = patch_of_slot.shape[0]
    if patches_per_image is not None and (
        not _is_int(patches_per_image) or patches_per_image < 0 or slots != images * patches_per_image
    ):
        raise ValueError(
            f"patches_per_image is {patches_per_image!r}, expected None or what each of {images} images has of {slots} "
            "patches"
        )


def _can_be_read(table: Tensor) -> bool:
    """Whether values can be looked at: not while a graph is recorded, nor of tensors without data."""
    if torch.compiler.is_compiling() or table.is_meta or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if type(table) is not Tensor:
        return False
    return not (table.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_contents(
    grid: tuple[int, int],
    slot_of_patch: Tensor,
    patch_of_slot: Tensor,
    image_offsets: Tensor,
    patches_per_image: int | None,
) -> None:
    """The three tensors describe the same patches."""
    images, slots = slot_of_patch.shape[0], patch_of_slot.shape[0]
    flat, counts = slot_of_patch.view(-1), image_offsets.diff()
    for name, table, low, high in (
        ("slot_of_patch", flat, -1, slots - 1),
        ("patch_of_slot", patch_of_slot, 0, flat.numel() - 1),
        ("image_offsets", image_offsets, 0, slots),
    ):
        if table.numel() and (int(table.min()) < low or int(table.max()) > high):
            raise ValueError(
                f"{name} must lie in {low}..{high}, got values from {int(table.min())} to {int(table.max())}"
            )
    rising = int(image_offsets[0]) == 0 and int(image_offsets[-1]) == slots and not bool((counts < 0).any())
    if not rising or (patches_per_image is not None and bool((counts != patches_per_image).any())):
        each = "" if patches_per_image is None else f" ({patches_per_image} an image)"
        raise ValueError(f"image_offsets must rise from 0 to {slots}, the number of patches{each}, got other values")
    order = torch.arange(slots, dtype=torch.int32, device=flat.device)
    if int((flat >= 0).sum()) != slots or not torch.equal(flat.index_select(0, patch_of_slot), order):
        raise ValueError("slot_of_patch and patch_of_slot must be each other's inverse, got tables that disagree")
    image = torch.arange(images, dtype=torch.int32, device=flat.device).repeat_interleave(counts)
    if not torch.equal(patch_of_slot // (grid[0] * grid[1]), image):
        raise ValueError("patch_of_slot must be sorted by image as image_offsets says, got another order")


def _check_size(n: int, gh: int, gw: int) -> None:
    if not for_any_input() and n * gh * gw > _INT32_MAX:
        raise ValueError(f"{n} images of {gh}x{gw} patches exceed the int32 range of patch indices")
