"""Triton's kernels by themselves, on the cases of the CUDA operators, and the MLP's fused products."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch

from convnextv2_kernels.benchmark.machine import automatic_backend, free_memory

from .cases import DRY_STAGES, Case, StageShape, stage_shapes
from .ceilings import GIB, copy_tbps, matmul_tflops
from .conv_cases import dense_cases, packed_cases
from .kernels import measure
from .operators import Draw
from .parameter_cases import parameter_cases
from .results import Recorder
from .row_cases import copy_cases, mlp_cases, norm_cases
from .setting import Setting
from .timing import Timer, trim_memory
from .triton_products import Tiles, measure_kernel, measure_whole
from .triton_setup import compile_ahead, feature_dtype, require

# (what, model, images, seconds it takes about), in order of value
PLAN = (
    ("products", "tiny", 256, 12),
    ("kernels", "tiny", 256, 30),
    ("products", "atto", 256, 10),
    ("products", "base", 256, 15),
    ("kernels", "atto", 256, 30),
    ("products", "tiny", 64, 10),
    ("products", "atto", 64, 8),
    ("kernels", "tiny", 64, 20),
    ("kernels", "atto", 64, 20),
)
DRY_PLAN = (("products", "dry", 1, 1), ("kernels", "dry", 1, 1))
# what the backend leaves to PyTorch, or has not
NOT_TRITON = ("layout_from_kept", "neighbour_slots", "products_reduce", "torch")


class Operators:
    """What the cases call, by Triton: its operators, and methods of its backend under the CUDA operators' arguments."""

    def __init__(self):
        from convnextv2_kernels import backends
        from convnextv2_kernels.backends.triton import norm_grad
        from convnextv2_kernels.params import MLPOptions, MLPParams, NormParams, Places, RowNorm, Segments

        k = self._backend = backends.get("triton")

        def options(eps: float, tanh: bool) -> MLPOptions:
            return MLPOptions("gelu_tanh" if tanh else "gelu", eps, False, "hidden", torch.bfloat16)

        def parameters(w1, b1, w2, b2, beta, ln_weight, ln_bias, like):
            return k.prepare_mlp(MLPParams(w1, b1, beta, beta, w2, b2), NormParams(ln_weight, ln_bias), like)

        def act(tanh: bool) -> str:
            return "gelu_tanh" if tanh else "gelu"

        self._functions = {
            "gelu_statistics": lambda a, h, gamma, eps, tanh, *s: k.gelu_statistics(
                a, h, gamma, Segments(*s), options(eps, tanh)
            ),
            "gelu_scale": lambda a, out, scale, tanh, *s: k.gelu_scale(a, out, scale, Segments(*s), act(tanh)),
            "mlp_backward_statistics": lambda a, ds, t, norm, gamma, eps, tanh, *s: k.mlp_backward_statistics(
                a, ds, t, norm, gamma, Segments(*s), options(eps, tanh)
            ),
            "mlp_backward_pointwise": lambda a, ds, scale, kappa, hs, da, tanh, *s: k.mlp_backward_pointwise(
                a, ds, (scale, kappa), hs, da, Segments(*s), act(tanh)
            ),
            "products_weight": k.gemms_weight,
            "gather_normalize": lambda x, slots, gh, gw, weight, bias, eps: k.gather_normalize(
                x, Places(slots, (gh, gw), x.shape[1] // gh), RowNorm(weight, bias, eps)
            ),
            "normalized_backward_put": lambda dy, z, rstd, weight, slots, gh, gw, dx: k.normalized_backward_put(
                dy, z, rstd, weight, Places(slots, (gh, gw), dx.shape[1] // gh), dx
            ),
            "put_patches": lambda x, slots, gh, gw, out: k.put_patches(
                x, Places(slots, (gh, gw), out.shape[1] // gh), out
            ),
            "normalized_backward_input": norm_grad.normalized_backward_input,
            "mlp_parameters": parameters,
            "unfold_layer_norm": lambda w1, weight, bias, db1, dw1: k.unfold_layer_norm(
                w1, NormParams(weight, bias), dw1, db1
            ),
        }

    def __getattr__(self, name: str) -> SimpleNamespace:
        function = self._functions.get(name)
        return getattr(self._backend.operators, name) if function is None else SimpleNamespace(default=function)


def row_and_conv_cases(ops, stages: tuple[StageShape, ...], itemsize: int) -> list[Case]:
    """The cases of the CUDA operators that the Triton backend has kernels for."""
    found: list[Case] = []
    for family in (packed_cases, mlp_cases, norm_cases, parameter_cases):
        found += [case for shape in stages for case in family(ops, shape, itemsize)]
    found += copy_cases(ops, stages[0], itemsize) + dense_cases(ops, stages[0], itemsize)
    return [case for case in found if case.key.split()[0] not in NOT_TRITON and " tensor " not in case.key]


def shape_of(stage: StageShape, dtype: torch.dtype):
    """The MLP of a stage, as plans know it."""
    from convnextv2_kernels.backends.triton.plans import Shape

    return Shape(dtype, stage.width, 4 * stage.width, stage.width, stage.kept * stage.side**2)


class _Stage:
    """Measures with what is measured once: the copy bandwidth and the rate of matrix products."""

    def __init__(self, setting: Setting, recorder: Recorder):
        self.setting, self.recorder = setting, recorder
        self.dtype = feature_dtype(setting)
        self.timer = Timer(setting.device, 1 if setting.dry_run else 9)
        size, n = (1 << 16, 32) if setting.dry_run else (GIB, 8192)
        self.copy = self._rate("copy_TBps", lambda: copy_tbps(self.timer, size, 4))
        self.matmul = self._rate("matmul_TFLOPs", lambda: matmul_tflops(self.timer, n, self.dtype))

    def _rate(self, key: str, call) -> float:
        value = self.recorder.case("rates", key, call, needs=2, limit=40)
        free_memory(self.setting.device)
        if value is None:
            raise RuntimeError(f"{key} could not be measured")
        return value

    def kernels(self, model: str, stages: tuple[StageShape, ...]) -> None:
        """Convolution, norm, row, parameter and copy kernels of a model."""
        draw, dry = Draw(self.setting.device, self.dtype), self.setting.dry_run
        cases = row_and_conv_cases(Operators(), stages, self.dtype.itemsize)
        self._compile(f"{model} kernels", lambda: [lambda c=c: c.make(draw, 1)[0]() for c in cases])
        for case in cases:
            # what could not be compiled ahead is compiled when Timer runs the call, before it captures it
            run = lambda c=case: measure(c, draw, self.timer, self.copy, dry)  # noqa: E731
            self.recorder.case("kernels", case.key, run, needs=2, limit=45)
            trim_memory(self.setting.device)

    def products(self, stage: StageShape) -> None:
        """Fused products of a stage."""
        from convnextv2_kernels import backends
        from convnextv2_kernels.backends.triton import INTERPRETED, plans, tune

        keys = [*plans.KERNELS, "forward", "backward"]
        if all(self.recorder.done("products", f"{key} {stage.label}") for key in keys):
            return
        torch.manual_seed(0)
        shape, device = shape_of(stage, self.dtype), self.setting.device
        case, tiles = tune.Case(shape, stage.images, device), Tiles.of(shape)
        name_of = "triton" if INTERPRETED else automatic_backend(device, self.dtype)
        backend = backends.get(name_of)

        def everything():
            calls = [case.kernel(name, tiles.all[name]) for name in plans.KERNELS]
            yield from filter(None, calls)
            for direction in ("forward", "backward"):
                yield from case.variants(direction, backend, tiles.all).values()

        self._compile(f"{stage.label} products", everything)
        arguments = (self.timer, self.copy, self.matmul)
        for name in plans.KERNELS:
            run = lambda n=name: measure_kernel(case, n, tiles, *arguments)  # noqa: E731
            self.recorder.case("products", f"{name} {stage.label}", run, needs=2, limit=45)
            trim_memory(device)
        for way in ("forward", "backward"):
            run = lambda w=way: {**measure_whole(case, w, tiles, backend, self.timer), "passes": name_of}  # noqa: E731
            self.recorder.case("products", f"{way} {stage.label}", run, needs=2, limit=45)

    def _compile(self, key: str, runs) -> None:
        self.recorder.case("compiled", key, lambda: compile_ahead(runs()), needs=5, limit=self.setting.remaining() + 5)
        free_memory(self.setting.device)


def run(setting: Setting, recorder: Recorder) -> None:
    require(setting)
    stage = _Stage(setting, recorder)
    recorder.put(
        about="kernels: as the stage kernels. products: us per call, warm, in a graph; MB: least traffic, partial sums "
        "counted; copy_share, product_share: of what a copy of 1 GiB and a product of 8192 cubed reach, above 1 where "
        "operands lie in the cache; vendor_us: the matrix products alone by the vendor's library; tile: rows, columns, "
        "depth, warps, stages, of the committed plan where planned. forward, backward: the whole MLP by each way; "
        "plan: what the committed plan takes; passes: the backend of what surrounds the products"
    )
    for what, model, images, seconds in DRY_PLAN if setting.dry_run else PLAN:
        # the interpreter is slow: one shape of each, for products the one whose plan fuses
        dry = DRY_STAGES[:1] if what == "products" else DRY_STAGES[1:2]
        stages = dry if setting.dry_run else stage_shapes(model, images)
        key = f"{model} n{images} {what}"
        if setting.remaining() < seconds / 2:
            recorder.skip(key, f"time: {setting.remaining():.0f} s left, about {seconds} s needed")
            continue
        if what == "kernels":
            stage.kernels(f"{model} n{images}", stages)
        else:
            for shape in stages:
                stage.products(shape)
                gc.collect()
        free_memory(setting.device)
