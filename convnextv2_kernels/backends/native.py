"""The compiled module ``convnextv2_kernels._C``, which registers ``torch.ops.convnextv2_kernels``, and the base of
the two backends whose kernels it holds."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from .._console import visible
from .._files import read_json
from ..errors import FileError
from ..params import MLPOptions, Segments
from . import _fakes, _flops
from .base import KernelBackend, mismatch


def _built_for() -> str:
    """What the module was compiled against, as far as the note beside it says."""
    try:
        built = read_json(Path(__file__).parent.with_name("_C.build.json"), limit=1 << 16)
    except (OSError, FileError):
        built = None
    version, cuda = (built.get(name) for name in ("torch", "cuda")) if isinstance(built, dict) else (None, None)
    if not isinstance(version, str) or not isinstance(cuda, str | None):
        return "an unknown PyTorch"
    return visible(_versions(version, cuda))


def _versions(torch_version: str | None, cuda: str | None) -> str:
    return f"PyTorch {torch_version} with {'CUDA ' + cuda if cuda else 'no CUDA'}"


def _not_built() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / "setup.py").exists():
        return "the C++ extension was not built (no compiler was found at installation)"
    # Python imports from the folder it is started in before it looks for what is installed.
    return (
        f"the C++ extension was not built in {root}, the source tree that Python imports from; with a C++ compiler "
        "`pip install --no-build-isolation -e .` builds it there"
    )


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("convnextv2_kernels._C"), None
    except ModuleNotFoundError:
        return None, _not_built()
    except ImportError as error:
        found = _versions(torch.__version__, torch.version.cuda)
        return None, f"the C++ extension was built for {_built_for()} and does not load with {found}: {error}"


module, load_error = _load()


class NativeBackend(KernelBackend):
    """Kernels of ``csrc``: every operator is C++ or CUDA."""

    dtypes: ClassVar[tuple[torch.dtype, ...]]
    namespace = "convnextv2_kernels"

    def __init__(self) -> None:
        self.operators = getattr(torch.ops, self.namespace)
        if self.load_error() is None:
            _fakes.register(self.namespace)  # so that the operators can be traced
            _flops.register(self.namespace)

    @abstractmethod
    def load_error(self) -> str | None:
        """Why the kernels are not there, or None."""

    def unsupported_reason(self, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
        if (error := self.load_error()) is not None:
            return error
        return mismatch(device_type, dtype, self.device_type, self.dtypes, self.kind)

    @property
    def kind(self) -> str:
        """Subject and verb of :meth:`unsupported_reason`."""
        return "kernels serve"

    def gelu_statistics(
        self, a: Tensor, h: Tensor | None, gamma: Tensor, segments: Segments, options: MLPOptions
    ) -> tuple[Tensor, Tensor]:
        tanh = options.act == "gelu_tanh"
        return self.operators.gelu_statistics.default(a, h, gamma, options.eps, tanh, *segments)

    def gelu_scale(self, a: Tensor, out: Tensor, scale: Tensor | None, segments: Segments, act: str) -> None:
        self.operators.gelu_scale.default(a, out, scale, act == "gelu_tanh", *segments)

    def mlp_backward_statistics(
        self,
        a: Tensor | None,
        ds: Tensor | None,
        t: Tensor | None,
        norm: Tensor,
        gamma: Tensor,
        segments: Segments,
        options: MLPOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tanh = options.act == "gelu_tanh"
        return self.operators.mlp_backward_statistics.default(a, ds, t, norm, gamma, options.eps, tanh, *segments)

    def mlp_backward_pointwise(
        self,
        a: Tensor,
        ds: Tensor,
        scales: tuple[Tensor, Tensor],
        hs: Tensor | None,
        da: Tensor,
        segments: Segments,
        act: str,
    ) -> Tensor:
        return self.operators.mlp_backward_pointwise.default(a, ds, *scales, hs, da, act == "gelu_tanh", *segments)
