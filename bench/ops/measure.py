"""Forward and backward of each op on one stage of a model: sparse against masked dense PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convnextv2_kernels.benchmark import counts
from convnextv2_kernels.benchmark.baseline import MEMORY_FORMATS, PATCH, keep_map
from convnextv2_kernels.benchmark.correctness import CorrectnessError, compare, require, rounding_floor
from convnextv2_kernels.benchmark.machine import synchronized
from convnextv2_kernels.benchmark.timing import Budget, Control, rounds_for, summarize, time_interleaved
from convnextv2_kernels.benchmark.variants import MASK_RATIO, SPARSE, Settings
from convnextv2_kernels.errors import describe_error
from convnextv2_kernels.layout import PatchLayout, mask_fault, random_mask
from convnextv2_kernels.models import get_config

from .. import ceilings
from .cases import IN_CHANS, SPECS, OpSpec, Rows, Sites

# Short ops get more rounds, until they fill this time, so that their medians settle.
MIN_SECONDS = 0.4
# A sample is as many calls as fill this time, so that a short op is not timed with cold caches.
SAMPLE_SECONDS = 0.005
CHECKED_IMAGES = 2


@dataclass
class OpVariant:
    """An op bound to its inputs: leaves to differentiate, and the gradient of the output."""

    call: Callable[[dict[str, Tensor]], Tensor]
    leaves: dict[str, Tensor]
    cotangent: Tensor
    autocast: bool
    device: str = "cpu"

    def copy(self) -> OpVariant:
        """The same op on inputs of its own."""
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves, cotangent=self.cotangent.clone())

    def run(self) -> Tensor:
        return self.call(self.leaves)

    def forward_backward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and gradients of all leaves."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            output = self.run()
        return output, torch.autograd.grad(output, list(self.leaves.values()), self.cotangent)


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """A function of ``times`` calls."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def pack(dense: Tensor, mask: Tensor) -> Tensor:
    """Visible patches [P, s, s, C] of an NHWC map, by indexing (the check trusts no kernel)."""
    n, height, width, c = dense.shape
    gh, gw = mask.shape[1:]
    patches = dense.reshape(n, gh, height // gh, gw, width // gw, c).transpose(2, 3)
    return patches[~mask].contiguous()


class OpCase:
    """One op on one stage: random inputs, shared by all variants, zero at hidden sites.

    Args:
        spec: the op.
        width: channels of the stage.
        side: sites along one side of a patch in the stage.
        mask: [N, Gh, Gw] bool, True = hidden; the case lives on its device.
        dtype: float32, or bfloat16 for autocast with bfloat16 activations and float32 parameters.
        seed: of inputs and parameters.
    """

    def __init__(self, spec: OpSpec, width: int, side: int, mask: Tensor, dtype: torch.dtype, seed: int) -> None:
        self.spec, self.width, self.side, self.mask, self.dtype = spec, width, side, mask, dtype
        generator = torch.Generator().manual_seed(seed)
        n, gh, gw = mask.shape
        device = mask.device
        keep = keep_map(mask, side, torch.float32)
        if spec.source == "images":
            x = torch.randn(n, IN_CHANS, 4 * gh * side, 4 * gw * side, generator=generator).to(device)
        else:
            x = torch.randn((n, gh * side, gw * side, spec.factor * width), generator=generator).to(device) * keep
        # Rounded to the dtype of the activations once, so that float64 starts from the same values.
        self.x = x.to(dtype).to(torch.float32)
        self.keep = keep_map(mask, side // spec.stride, torch.float32)
        self.sites = Sites(self.keep, (~mask).nonzero(as_tuple=True), (gh, gw))
        self.parameters = {name: value.to(device, torch.float32) for name, value in spec.parameters(width).items()}
        with torch.no_grad():
            layout, function = next(iter(spec.dense.values()))
            out_width = function(self._peer_input(layout), self.parameters, self.sites).shape[-1]
        cotangent = torch.randn((*self.keep.shape[:3], out_width), generator=generator).to(device) * self.keep
        self.cotangent = cotangent.to(dtype).to(torch.float32)
        self.layout = PatchLayout.from_mask(mask)

    def _peer_input(self, layout: str) -> Tensor:
        """What a peer of this layout reads, in float32."""
        if layout == "packed":
            return pack(self.x, self.mask)
        x = self.x if self.spec.source == "images" else self.x.permute(0, 3, 1, 2)
        return x.contiguous(memory_format=MEMORY_FORMATS["channels_last" if layout == "visible" else layout])

    def _packed(self, t: Tensor) -> Tensor:
        """Visible patches of an NHWC map, or of what is packed already."""
        side = self.keep.shape[1] // self.mask.shape[1]
        return t if tuple(t.shape[:3]) == (self.layout.num_patches, side, side) else pack(t, self.mask)

    def variants(self) -> dict[str, OpVariant]:
        """The sparse variant and each dense one."""
        return {SPARSE: self.sparse_variant(), **{k: self.dense_variant(k) for k in self.spec.dense}}

    def sparse_variant(self) -> OpVariant:
        """The library's op on packed visible patches."""
        x = pack(self.x, self.mask) if self.spec.source == "packed" else self.x
        x, leaves = self._split(x.to(self.dtype), torch.float32)
        layout = self.layout

        def call(leaves: dict[str, Tensor]) -> Tensor:
            given = leaves.get("x", x)
            return self.spec.sparse(given, {k: t for k, t in leaves.items() if k != "x"}, layout)

        variant = OpVariant(call, leaves, self.cotangent, self._autocast, self.mask.device.type)
        self._set_cotangent(variant)
        return variant

    def dense_variant(self, name: str, dtype: torch.dtype | None = None) -> OpVariant:
        """The plain PyTorch peer called ``name``; with ``dtype`` float64 it is the truth of the check."""
        layout, function = self.spec.dense[name]
        exact = dtype == torch.float64
        x = self._peer_input(layout).to(dtype or self.dtype)
        x, leaves = self._split(x, torch.float64 if exact else torch.float32)
        sites = self.sites._replace(keep=self.keep.to(x.dtype))

        def call(leaves: dict[str, Tensor]) -> Tensor:
            return function(leaves.get("x", x), leaves, sites)

        autocast, device = self._autocast and not exact, self.mask.device.type
        variant = OpVariant(call, leaves, self.cotangent, autocast, device)
        self._set_cotangent(variant)
        return variant

    def _set_cotangent(self, variant: OpVariant) -> None:
        """In the shape and strides of the output, as the gradient of a next layer would come."""
        with torch.no_grad(), torch.autocast(variant.device, torch.bfloat16, enabled=variant.autocast):
            output = variant.run()
        cotangent = self.cotangent if output.shape == self.cotangent.shape else self._packed(self.cotangent)
        variant.cotangent = torch.empty_like(output).copy_(cotangent)

    @property
    def _autocast(self) -> bool:
        return self.dtype == torch.bfloat16

    def _split(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """x, and the leaves to differentiate: the parameters, and x itself unless it is images."""
        leaves = {} if self.spec.source == "images" else {"x": x}
        leaves |= {k: v.to(dtype) for k, v in self.parameters.items()}
        return x, {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}

    def _results(self, variant: OpVariant, packed: bool) -> dict[str, Tensor]:
        """Output and gradients, of visible sites; ``packed``: of the library's op, or of one that takes what it
        takes."""
        output, grads = variant.forward_backward()
        results = {f"gradient of {k}": g for k, g in zip(variant.leaves, grads, strict=True)}
        results["output"] = self._packed(output.detach())
        x = results.get("gradient of x")
        if x is not None and tuple(x.shape[:3]) != (self.layout.num_patches, self.side, self.side):
            results["gradient of x"] = pack(x if packed else x.permute(0, 2, 3, 1), self.mask)
        return results

    def check(self) -> dict:
        """Output and gradients against float64; raises CorrectnessError where they are wrong."""
        names = list(self.spec.dense)
        truth = self._results(self.dense_variant(names[-1], torch.float64), packed=False)
        dense = [self._results(self.dense_variant(name), packed=False) for name in names]
        sparse = self._results(self.sparse_variant(), packed=True)
        floor = rounding_floor(self.rows(dense=False), self.dtype)
        return require(compare(truth, dense, sparse, floor), f"{self.spec.name} {self.label}")

    @property
    def label(self) -> str:
        return f"C={self.width} s={self.side}"

    def rows(self, dense: bool) -> int:
        """Sites of the input: all, or the visible ones."""
        return (self.mask.numel() if dense else int((~self.mask).sum())) * self.side**2

    def work(self, dense: bool) -> counts.Work:
        """Counted minimum of forward and backward."""
        mask = torch.zeros_like(self.mask) if dense else self.mask
        rows = Rows(self.rows(dense), counts.visible_taps(mask, self.side), self.rows(True))
        return self.spec.work(rows, self.width, self.dtype.itemsize)

    def is_dense(self, name: str) -> bool:
        """Whether a variant computes hidden sites as well."""
        return name in self.spec.dense and self.spec.dense[name][0] in MEMORY_FORMATS


def stage_cases(
    model_name: str, batch_size: int, img_size: int, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> Iterator[OpCase]:
    """Every op on every stage of a model, built one at a time (their inputs are large)."""
    side = img_size // PATCH
    if (fault := mask_fault((side, side), MASK_RATIO, PATCH)) is not None:
        raise ValueError(fault)
    mask = random_mask(batch_size, (side, side), generator=torch.Generator().manual_seed(seed))
    mask = mask.to(device)
    for stage, width in enumerate(get_config(model_name).dims):
        for spec in SPECS:
            if spec.fits(8 >> stage):
                yield OpCase(spec, width, 8 >> stage, mask, dtype, seed)


@dataclass(frozen=True)
class OpSettings(Settings):
    """What ``bench ops`` measures; ``quick``: no more rounds for short ops, and limits measured once; ``compile``: also
    the fastest eager peer, compiled."""

    models: tuple[str, ...] = ("convnextv2_atto", "convnextv2_tiny")
    quick: bool = False
    compile: bool = True


def measure_ops(model_name: str, settings: OpSettings, budget: Budget, log: Callable[[str], None]) -> dict:
    """Check, then time every op of a model beside its limits, measured before and after.

    Raises CorrectnessError before timing when one disagrees.
    """
    from .engines import engine_variants  # here, because it imports this module

    few = min(CHECKED_IMAGES, settings.batch_size)
    shape = (settings.img_size, settings.torch_dtype, settings.seed, settings.device)
    log(f"{model_name}: comparing every op with float64")
    checks = [case.check() for case in stage_cases(model_name, few, *shape)]
    log(f"{model_name}: what this machine can do at most")
    limits = ceilings.measure(settings.device, settings.torch_dtype)
    rows, skipped = [], []
    for case in stage_cases(model_name, settings.batch_size, *shape):
        if budget.spent:
            skipped.append(f"{case.spec.name} {case.label}")
            continue
        log(f"{model_name}: {case.spec.name} {case.label}")
        floor = 0.0 if settings.quick else MIN_SECONDS
        engines, left_out = engine_variants(case)
        row = measure_case(case, settings.repeats, budget, floor, engines, settings.compile)
        rows.append({**row, "engines_left_out": left_out} if left_out else row)
    if not settings.quick:
        limits = limits.best(ceilings.measure(settings.device, settings.torch_dtype))
    for row in rows:
        _add_limits(row, limits)
    return {"checked_cases": len(checks), "ceilings": limits.to_json(), "rows": rows, "skipped": skipped}


def _add_limits(row: dict, limits: ceilings.Ceilings) -> None:
    """Add to each variant of a row the least time of its counted work, and the share of its time that this is."""
    for variant in row["variants"].values():
        if "comparable" in variant:
            continue  # another engine, whose own limits nobody here counts
        work = counts.Work(**row["work"][variant.pop("counted")])
        least = limits.limit_ms(work)
        variant |= {"limit_ms": least, "share": least / variant["median_ms"], "bound": limits.bound(work)}


def measure_case(
    case: OpCase,
    repeats: int,
    budget: Budget,
    min_seconds: float = MIN_SECONDS,
    engines: Mapping[str, OpVariant] | None = None,
    compiled: bool = False,
) -> dict:
    """Time the variants of one case, interleaved; JSON-ready, with rates by counted work.

    ``engines`` are variants of other sparse engines (:mod:`.engines`), timed beside ours and the dense ones and flagged
    ``comparable`` or not; the ratio is against dense PyTorch all the same. The control is the fastest dense variant
    against itself on inputs of its own. ``compiled``: the fastest eager dense variant once more, compiled.
    """
    engines = engines or {}
    variants = {**case.variants(), **engines}
    device = case.mask.device.type
    seconds: dict[str, float] = {}

    def warm(name: str) -> None:
        # Two warm calls; the second, without one-time set-up, tells how many calls make a sample.
        for _ in range(2):
            start = budget.clock()
            synchronized(variants[name].forward_backward, device)()
            seconds[name] = budget.clock() - start

    for name in variants:
        warm(name)
    dense = [name for name in variants if name != SPARSE and name not in engines]
    original = min(dense, key=seconds.__getitem__)
    left_out = None
    if compiled:
        try:
            variants[f"{original} compile"] = compiled_variant(variants[original])
        except Exception as error:  # a compiler's, of many kinds
            left_out = describe_error(error)
        else:
            warm(f"{original} compile")
            dense.append(f"{original} compile")
    copied = f"{original} copy"
    variants[copied] = variants[original].copy()
    warm(copied)
    seconds[copied] = seconds[original]
    calls = {name: max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))) for name, once in seconds.items()}
    steps = {name: synchronized(repeated(v.forward_backward, calls[name]), device) for name, v in variants.items()}
    start = budget.clock()
    for step in steps.values():
        step()
    rounds = rounds_for(budget.clock() - start, repeats, min_seconds)
    samples = time_interleaved(steps, rounds, budget.deadline, budget.clock)
    control = Control.from_samples(original, samples[original], samples.pop(copied))
    results = {
        name: {**summarize([t / calls[name] for t in times]), "calls_per_sample": calls[name]}
        for name, times in samples.items()
    }
    for name, result in results.items():
        if name in engines:
            result["comparable"] = engines[name].comparable
        else:
            result["counted"] = "dense" if case.is_dense(name.removesuffix(" compile")) else SPARSE
        if result.get("comparable", True):  # another operation has other work
            work = case.work(dense=result.get("counted") == "dense")
            result["rates"] = work.rates(result["median_ms"])
    fastest = min(dense, key=lambda name: results[name]["median_ms"])
    return {
        "op": case.spec.name,
        "width": case.width,
        "side": case.side,
        "work": {kind: vars(case.work(dense=kind == "dense")) for kind in (SPARSE, "dense")},
        "variants": results,
        "control": control.to_json(),
        "fastest_dense": fastest,
        "time_ratio": results[fastest]["median_ms"] / results[SPARSE]["median_ms"],
        **({"compile_left_out": left_out} if left_out else {}),
    }


def compiled_variant(variant: OpVariant) -> OpVariant:
    """The same peer compiled, on the same inputs; its results agree with the eager ones but for rounding."""
    torch._dynamo.reset()  # one function is compiled for many shapes, each of them anew
    compiled = replace(variant, call=torch.compile(variant.call, fullgraph=True, dynamic=False))
    (output, grads), (expected, expected_grads) = compiled.forward_backward(), variant.forward_backward()
    tolerance = 1e-4 if output.dtype == torch.float32 else 5e-2
    for got, wanted in zip((output, *grads), (expected, *expected_grads), strict=True):
        error = torch.linalg.vector_norm((got - wanted).float()) / torch.linalg.vector_norm(wanted.float())
        if not error <= tolerance:
            raise CorrectnessError(f"compiled and eager results differ by {error:.1e} of their norm")
    return compiled
