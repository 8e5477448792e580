"""Variants of the FCMAE step, on a CPU and on a GPU: ours and masked dense ones, all with the same weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..graphs import make_graphed_step
from ..layout import PatchLayout, mask_fault, num_kept, random_mask
from ..models import create_fcmae
from .baseline import PATCH, Baseline, MaskedDenseFCMAE

SPARSE = "sparse"
MASK_RATIO = 0.6  # share of the patches that is hidden, the paper's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXECUTIONS = ("eager", "graph", "compile")


@dataclass
class Batch:
    """Images [N, C, H, W], mask [N, Gh, Gw] bool (True = hidden, as many in each image) and the compute dtype."""

    images: Tensor
    mask: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def autocast(self) -> bool:
        return self.dtype != self.images.dtype

    @property
    def device(self) -> str:
        return self.images.device.type

    @cached_property
    def kept(self) -> Tensor:
        """Ids [N, K] of the visible patches."""
        return (~self.mask).flatten(1).nonzero()[:, 1].view(len(self.mask), -1)

    def where(self) -> Tensor | PatchLayout:
        """What our model is given in every step: the mask; on a GPU a layout made, without a wait, from the ids."""
        if self.device == "cpu":
            return self.mask
        return PatchLayout.from_kept(self.kept, tuple(self.mask.shape[1:]))

    def head(self, count: int) -> Batch:
        """The first ``count`` images."""
        return Batch(self.images[:count], self.mask[:count], self.dtype)

    def to_float64(self) -> Batch:
        """The same batch, computed in float64."""
        return Batch(self.images.double(), self.mask, torch.float64)


@dataclass(frozen=True)
class Settings:
    """A batch and how often to time it, shared by the modes; ``mask_ratio`` hides that share of the patches."""

    batch_size: int = 8
    img_size: int = 224
    mask_ratio: float = MASK_RATIO
    repeats: int = 10
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def make_batch(self, **changes) -> Batch:
        """The batch, with some settings changed."""
        here = dataclasses.replace(self, **changes)
        return make_batch(here.batch_size, here.img_size, here.seed, here.torch_dtype, here.device, here.mask_ratio)


@dataclass
class Variant:
    """One way to compute the step.

    Attributes:
        run: (images, mask or layout) -> (loss, prediction, ...): the model, or what it was compiled to.
        execution: "eager"; "graph", the whole step captured in a CUDA graph; or "compile", ``torch.compile``.
        baseline: how the masked dense network is written, None where it is not masked dense.
        engine: the sparse engine of another project that computes the encoder, None without one.
        backend: of ours, None for the one in force.
        maps: dtype of our feature maps, None for that of the images.
        cudnn: whether convolutions may be cuDNN's, or must be PyTorch's own.
        compile_mode: of ``torch.compile``, None for its default.
    """

    name: str
    model: nn.Module
    run: Callable
    execution: str = "eager"
    baseline: Baseline | None = None
    backend: str | None = None
    maps: torch.dtype | None = None
    cudnn: bool = True
    compile_mode: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        if self.execution not in EXECUTIONS:
            raise ValueError(f"execution is {self.execution!r}, expected one of {', '.join(EXECUTIONS)}")

    @property
    def ours(self) -> bool:
        return self.baseline is None and self.engine is None

    @property
    def dense(self) -> bool:
        return self.baseline is not None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and prediction, under autocast of the batch's device where the batch asks for it."""
        with torch.autocast(batch.device, batch.dtype, enabled=batch.autocast), self._configured():
            return self._call(batch.images, batch)

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward, gradients dropped; no optimizer. Returns the loss."""
        with self._configured():  # backward included
            loss, _ = self.forward(batch)
            loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def prepare(self, batch: Batch) -> Callable[[], Tensor]:
        """The step bound to a batch, captured where it is a graph; it returns the loss.

        Raises ValueError where there is no GPU to capture on."""
        if self.execution == "graph":
            return self._captured(batch)
        if self.compile_mode == "reduce-overhead":
            return lambda: self._marked_step(batch)
        return lambda: self.step(batch)

    def _captured(self, batch: Batch) -> Callable[[], Tensor]:
        autocast = batch.dtype if batch.autocast else None
        with self._configured():
            step = make_graphed_step(
                self.model, batch.images, lambda _, images: self._call(images, batch)[0], autocast=autocast
            )

        def replay() -> Tensor:
            loss = step(batch.images)
            self.model.zero_grad(set_to_none=True)  # an eager step that follows must not add to these gradients
            return loss

        return replay

    def _marked_step(self, batch: Batch) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.step(batch).clone()  # the loss lives in memory that the next step writes

    def copy(self) -> Variant:
        """The same with a copy of the weights; of eager variants only."""
        if self.run is not self.model:
            raise ValueError(f"{self.name} is not the plain call of its model, and cannot be copied")
        model = copy.deepcopy(self.model)
        return dataclasses.replace(self, name=f"{self.name} copy", model=model, run=model)

    def graphed(self) -> Variant:
        """The same step in one CUDA graph."""
        return dataclasses.replace(self, name=f"{self.name.removesuffix(' eager')} graph", execution="graph")

    def native(self) -> Variant:
        """The same with PyTorch's own convolutions."""
        return dataclasses.replace(self, name=f"{self.name} native", cudnn=False)

    def with_maps(self, maps: torch.dtype) -> Variant:
        """The same with feature maps of another dtype."""
        return dataclasses.replace(self, name=f"{self.name}, {str(maps).removeprefix('torch.')} maps", maps=maps)

    def described(self) -> dict:
        """JSON-ready: what there is to know besides the numbers."""
        found: dict = {"execution": self.execution, "baseline": dict(vars(self.baseline)) if self.dense else None}
        if self.engine is not None:
            found["engine"] = self.engine
        if self.backend is not None:
            found["backend"] = self.backend
        if self.maps is not None:
            found["maps"] = str(self.maps).removeprefix("torch.")
        if not self.cudnn:
            found["convolutions"] = "native"
        if self.compile_mode is not None:
            found["compile_mode"] = self.compile_mode
        return found

    def _call(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if not self.ours:
            return self.run(images, batch.mask)[:2]
        if self.model.encoder.feature_dtype != self.maps:
            self.model.encoder.feature_dtype = self.maps
        with contextlib.nullcontext() if self.backend is None else use_backend(self.backend):
            return self.run(images, batch.where())[:2]

    @contextlib.contextmanager
    def _configured(self) -> Iterator[None]:
        if self.cudnn:
            yield
            return
        with torch.backends.cudnn.flags(enabled=False, benchmark=True):
            yield


def make_batch(
    size: int,
    img_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    mask_ratio: float = MASK_RATIO,
) -> Batch:
    """Random images and FCMAE masks (19 of 49 patches visible at 224 px and the paper's ratio).

    They are drawn on the CPU, so that one seed means the same batch on every device.

    Raises:
        ValueError: an argument out of range; no patch would be visible.
    """
    if size < 1:
        raise ValueError(f"batch size is {size}, expected at least 1")
    if img_size < PATCH or img_size % PATCH:
        raise ValueError(f"img_size is {img_size}, expected a positive multiple of {PATCH}")
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, img_size, img_size, generator=generator)
    side = img_size // PATCH
    # Nothing visible would time an encoder without work; nothing hidden is the whole network's work, and is allowed.
    if not num_kept((side, side), mask_ratio):
        raise ValueError(mask_fault((side, side), mask_ratio, PATCH))
    mask = random_mask(size, (side, side), mask_ratio, generator=generator)
    return Batch(images.to(device), mask.to(device), dtype)


def make_sparse(model_name: str, seed: int, device: str = "cpu") -> Variant:
    """Our FCMAE with random weights.

    GRN starts at zero in training, which would hide half of its backward pass from the correctness
    check, so vectors (biases, norms, GRN) are drawn around their initial values.
    """
    model = create_fcmae(model_name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == max(parameter.shape):
                parameter.add_(noise, alpha=0.2)
            else:
                parameter.copy_(noise.mul_(0.02))
    model.to(device)
    return Variant(SPARSE, model, model)


def run_by(sparse: Variant, backend: str) -> Variant:
    """Our variant computed by one backend; the model is the same object."""
    return dataclasses.replace(sparse, name=f"{SPARSE} {backend}", backend=backend)


def make_dense(sparse: Variant, baselines: Sequence[Baseline], execution: str = "eager") -> list[Variant]:
    """Masked dense variants with the weights of the sparse one; nothing is compiled or captured before it runs.

    Weights are the sparse variant's own tensors, but for convolutions whose memory format differs.
    """
    state = sparse.model.state_dict()
    models: dict[Baseline, MaskedDenseFCMAE] = {}
    variants = []
    for baseline in baselines:
        if baseline not in models:
            models[baseline] = MaskedDenseFCMAE.from_state_dict(state, baseline=baseline)
        model = models[baseline]
        run = torch.compile(model, fullgraph=True, dynamic=False) if execution == "compile" else model
        variants.append(Variant(f"{baseline.name} {execution}", model, run, execution, baseline))
    return variants


def make_truth(sparse: Variant) -> Variant:
    """The masked dense network in float64."""
    # A tensor of its own also where the model is in float64 already: its gradients are dropped.
    state = {key: value.to(torch.float64, copy=True) for key, value in sparse.model.state_dict().items()}
    model = MaskedDenseFCMAE.from_state_dict(state)
    return Variant("float64", model, model, baseline=Baseline("channels_last", "linear"))
