"""The CUDA backend: kernels of ``csrc/cuda``, GEMMs by cuBLAS through PyTorch.

``CONVNEXTV2_KERNELS_CUDA_EMULATION`` names a library built by ``python setup.py build_emulation``: the same kernels
compiled for the CPU. Then this backend runs on CPU tensors, and only those; it is slow, for tests, and never chosen by
``auto``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from ..params import MLPParams, NormParams
from ..settings import current
from . import native
from .native import NativeBackend

EMULATED = current.cuda_emulation is not None
if EMULATED:
    torch.ops.load_library(str(current.cuda_emulation))


def _find_load_error() -> str | None:
    if EMULATED:
        return None
    if native.module is None:
        return native.load_error
    if native.module.build_info()["cuda"] is None:
        return "the extension was built without CUDA (no nvcc, or a PyTorch without CUDA, at installation)"
    return None


# found once: calls into the extension cannot be traced by torch.compile
_load_error = _find_load_error()
_architectures = (
    () if EMULATED or _load_error or native.module is None else tuple(native.module.build_info()["cuda_architectures"])
)


def load_error() -> str | None:
    """Why the kernels are not there, or None."""
    return _load_error


def runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code built for an architecture runs on a GPU of compute capability ``major.minor``.

    "sm_90" is machine code, for 9.0 and later minor versions; "compute_90" is PTX, for 9.0 and all later GPUs; a
    suffix "a" is for that very version, "f" for its family."""
    kind, name = architecture.split("_")
    number, capability = int(name.rstrip("af")), 10 * major + minor
    if name.endswith("a"):
        return number == capability
    return number <= capability and (number // 10 == major or (kind == "compute" and not name.endswith("f")))


@functools.lru_cache
def _find_architecture_error(index: int | None) -> str | None:
    if EMULATED or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if any(runs_on(name, major, minor) for name in _architectures):
        return None
    built = ", ".join(_architectures)
    return f"the extension was built for {built}, and the GPU is of compute capability {major}.{minor}"


@torch.compiler.assume_constant_result
def _architecture_error(index: int | None) -> str | None:
    """Why the machine code in the extension does not run on a GPU, by default the current one, or None."""
    return _find_architecture_error(index)


class CUDABackend(NativeBackend):
    name = "cuda"
    device_type = "cpu" if EMULATED else "cuda"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    namespace = "convnextv2_kernels_emulated" if EMULATED else "convnextv2_kernels"

    def load_error(self) -> str | None:
        return _load_error

    def builds_layouts(self, device: torch.device) -> bool:
        """Whether a :class:`~convnextv2_kernels.layout.PatchLayout` of the device is built by the kernels below."""
        return _architecture_error(device.index) is None

    def layout_from_kept(self, ids: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """``ids [N, K]`` -> slot_of_patch, patch_of_slot and image_offsets of a layout."""
        return self.operators.layout_from_kept.default(ids, *grid)

    def neighbour_slots(
        self, slot_of_patch: Tensor, patch_of_slot: Tensor, grid: tuple[int, int], radius: int
    ) -> Tensor:
        """``[P, (2 * radius + 1)^2]``: the neighbour table of a layout."""
        return self.operators.neighbour_slots.default(slot_of_patch, patch_of_slot, *grid, radius)

    @property
    def kind(self) -> str:
        return "emulated kernels serve" if EMULATED else "kernels serve"

    def unsupported_reason(self, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
        reason = super().unsupported_reason(device_type, dtype, index)
        return _architecture_error(index) if reason is None else reason

    def prepare_mlp(self, params: MLPParams, layer_norm: NormParams | None, like: Tensor) -> MLPParams:
        """In one launch; ``W2 beta`` goes into the second bias."""
        stat = statistics_dtype(like.dtype)
        w1, b1, gamma, beta, w2, b2 = params
        if not (w1.dtype == w2.dtype and w1.dtype in (like.dtype, stat)):
            w1, w2 = w1.to(stat), w2.to(stat)
        w1, w2 = w1.contiguous(), w2.contiguous()
        vectors = (b1, b2, beta, *(layer_norm or (None, None)))
        first_bias, *rest = (None if t is None else t.to(stat).contiguous() for t in vectors)
        new_w1, new_b1, new_w2, new_b2 = self.operators.mlp_parameters.default(w1, first_bias, w2, *rest, like)
        w1, w2 = (new if new.shape[0] else old for new, old in ((new_w1, w1), (new_w2, w2)))
        return MLPParams(w1, new_b1, gamma, params.beta, w2, None if b2 is None else new_b2)

    def unfold_layer_norm(
        self, w1: Tensor, layer_norm: NormParams, dw1: Tensor, db1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = (t.to(dw1.dtype).contiguous() for t in layer_norm)
        if statistics_dtype(w1.dtype) != dw1.dtype:
            w1 = w1.to(dw1.dtype)
        dw1 = dw1.contiguous()
        dln_weight, dln_bias = self.operators.unfold_layer_norm.default(w1.contiguous(), weight, bias, db1, dw1)
        return dw1, dln_weight, dln_bias

    def gemms_reduce(self, g: Tensor, w2: Tensor) -> Tensor:
        return self.operators.products_reduce.default(g, w2)

    def gemms_weight(self, g: Tensor, scale: Tensor, d_sum: Tensor, beta: Tensor) -> Tensor:
        return self.operators.products_weight.default(g, scale, d_sum, beta)
