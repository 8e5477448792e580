"""Triton's kernels by themselves, on the cases of the CUDA operators, and the MLP's fused products."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch
from .cases import DRY_STAGES, Case, StageShape, stage_shapes
from .ceilings import GIB, copy_rate, matmul_rate
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

from convnextv2_kernels.benchmark.device import free_memory

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
    """What the cases call, by Triton: its operators, and plain functions under the CUDA operators' arguments."""

    def __init__(self):
        from convnextv2_kernels.backends.triton import operators, primitives

        self._operators = getattr(torch.ops, operators.NAMESPACE)
        passes = primitives.Passes

        def with_act(function, before: int):
            """The function with GELU's form as a name, given as a flag after ``before`` arguments."""

            def call(*args):
                act = "gelu_tanh" if args[before] else "gelu"
                return function(*args[:before], act, *args[before + 1 :])

            return call

        self._functions = {
            "gelu_statistics": with_act(passes.gelu_statistics, 4),
            "gelu_scale": with_act(passes.gelu_scale, 3),
            "mlp_backward_statistics": with_act(passes.mlp_backward_statistics, 6),
            "mlp_backward_pointwise": with_act(passes.mlp_backward_pointwise, 6),
            "products_weight": passes.products_weight,
            "normalized_backward_input": lambda dy, z, rstd: primitives.normalized_backward(dy, z, rstd, None)[0],
            "mlp_parameters": lambda w1, b1, w2, b2, beta, gain, shift, like: primitives.prepare_parameters(
                w1, b1, w2, b2, beta, (gain, shift), like
            ),
            "unfold_layer_norm": lambda w1, gain, shift, db1, dw1: primitives.unfold_layer_norm(
                w1, (gain, shift), dw1, db1
            ),
        }

    def __getattr__(self, name: str) -> SimpleNamespace:
        function = self._functions.get(name)
        return getattr(self._operators, name) if function is None else SimpleNamespace(default=function)


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
        self.copy = self._rate("copy_TBps", lambda: copy_rate(self.timer, size, 4))
        self.matmul = self._rate("matmul_TFLOPs", lambda: matmul_rate(self.timer, n, self.dtype))

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
        served = "triton" if INTERPRETED else backends.automatic("convnextv2_block", device, (self.dtype,))
        k = backends.primitives(served)

        def everything():
            calls = [case.kernel(name, tiles.all[name]) for name in plans.KERNELS]
            yield from filter(None, calls)
            for direction in ("forward", "backward"):
                yield from case.ways(direction, k, tiles.all).values()

        self._compile(f"{stage.label} products", everything)
        arguments = (self.timer, self.copy, self.matmul)
        for name in plans.KERNELS:
            run = lambda n=name: measure_kernel(case, n, tiles, *arguments)  # noqa: E731
            self.recorder.case("products", f"{name} {stage.label}", run, needs=2, limit=45)
            trim_memory(device)
        for way in ("forward", "backward"):
            run = lambda w=way: {**measure_whole(case, w, tiles, k, self.timer), "passes": served}  # noqa: E731
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
