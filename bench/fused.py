"""Training step of other libraries' ConvNeXt V2 as they come, compiled, and after ``fuse``.

    python -m bench fused --output bench/results/cpu_fused.json

A step is forward, cross-entropy and backward, in both memory formats. Before anything is timed, loss and gradients of
the fused model must agree with float64 as well as the model's own do (the check of
``convnextv2_kernels/benchmark/correctness.py``). Interleaved rounds, medians; bytes saved for backward as in the other
benchmarks. ``--libraries official`` is plain PyTorch under the official names; the others have to be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convnextv2_kernels as ck
from convnextv2_kernels.benchmark import allocator, machine, results
from convnextv2_kernels.benchmark.correctness import CorrectnessError, compare, require, rounding_floor
from convnextv2_kernels.benchmark.memory import saved_bytes
from convnextv2_kernels.benchmark.report import mebibytes
from convnextv2_kernels.benchmark.timing import Control, control_sentence, summarize, time_interleaved
from convnextv2_kernels.cli.bench import each_allocator
from convnextv2_kernels.cli.exit_codes import USAGE, UserError
from convnextv2_kernels.cli.types import model_name, positive_int, side

CLASSES = 1000
COPY = "copy"  # the control
LIBRARIES = ("timm", "transformers", "official")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def make_model(library: str, size: str) -> nn.Module:
    """The library's model, with GRN and biases drawn at random: at zero, half of the backward pass is hidden."""
    depths, dims = ck.models.CONFIGS[size]
    if library == "official":
        from helpers.official import OfficialConvNeXtV2

        model = OfficialConvNeXtV2(depths, dims, CLASSES)
    elif library == "timm":
        from helpers.reference_models import timm  # beside any PyTorch

        model = timm.create_model(size, num_classes=CLASSES)
    else:
        from helpers.reference_models import transformers

        config = transformers.ConvNextV2Config(depths=list(depths), hidden_sizes=list(dims), num_labels=CLASSES)
        model = transformers.ConvNextV2ForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "grn" in name or name.endswith("bias"):
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.train()


@dataclass
class FusedVariant:
    """One way to run the step; ``run`` is the model or its compiled form."""

    model: nn.Module
    run: Callable
    images: Tensor
    labels: Tensor
    autocast: torch.dtype | None

    def copy(self) -> FusedVariant:
        """The same on a copy of the model."""
        model = copy.deepcopy(self.model)
        return FusedVariant(model, model, self.images, self.labels, self.autocast)

    def loss(self) -> Tensor:
        context = contextlib.nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.images.device.type, self.autocast)
        with context:
            out = self.run(self.images)
        logits = out if isinstance(out, Tensor) else out.logits
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.labels)

    def step(self) -> None:
        self.loss().backward()
        self.model.zero_grad(set_to_none=True)
        if self.images.is_cuda:
            torch.cuda.synchronize()

    def saved_bytes(self) -> int:
        alive = [*self.model.parameters(), *self.model.buffers(), self.images, self.labels]
        total = saved_bytes(self.loss, alive)
        self.model.zero_grad(set_to_none=True)
        return total

    def results(self) -> dict[str, Tensor]:
        loss = self.loss()
        loss.backward()
        grads = {"gradient of " + name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss.detach()} | grads


def make_variants(
    model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> dict[str, FusedVariant]:
    variants = {}
    autocast = None if options.dtype == "float32" else getattr(torch, options.dtype)
    for name, memory_format in FORMATS.items():
        x = images.contiguous(memory_format=memory_format)
        plain = copy.deepcopy(model).to(memory_format=memory_format)
        variants[f"eager {name}"] = FusedVariant(plain, plain, x, labels, autocast)
        if options.compile:
            compiled = copy.deepcopy(plain)
            variants[f"compile {name}"] = FusedVariant(compiled, torch.compile(compiled), x, labels, autocast)
        for kind, save in (("fused", None), ("hidden kept", "hidden")):
            fused = copy.deepcopy(plain)
            report = ck.fuse(fused, save=save)
            variants[f"{kind} {name}"] = FusedVariant(fused, fused, x, labels, autocast)
    print(report)
    return variants


def check(
    model: nn.Module, variants: dict[str, FusedVariant], images: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict:
    """Loss and gradients of two images against float64."""
    few = {name: FusedVariant(a.model, a.model, a.images[:2], labels[:2], a.autocast) for name, a in variants.items()}
    wide = copy.deepcopy(model).double()
    truth = FusedVariant(wide, wide, images[:2].double(), labels[:2], None).results()
    plain = [variant.results() for name, variant in few.items() if name.startswith("eager")]
    floor = rounding_floor(2 * (images.shape[2] // 4) * (images.shape[3] // 4), dtype)
    passed = {}
    for name, variant in few.items():
        if name.startswith(("fused", "hidden kept")):
            passed[name] = require(compare(truth, plain, variant.results(), floor), name)
    return passed


def measure(library: str, size: str, options: argparse.Namespace) -> dict:
    torch._dynamo.reset()
    model = make_model(library, size).to(options.device)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size, generator=generator)
    labels = torch.randint(CLASSES, (options.batch_size,), generator=generator)
    images, labels = images.to(options.device), labels.to(options.device)
    variants = make_variants(model, images, labels, options)
    passed = check(model, variants, images, labels, getattr(torch, options.dtype))
    saved = {name: variant.saved_bytes() for name, variant in variants.items()}
    original = "eager channels_last"  # the usual format on a CPU
    variants[COPY] = variants[original].copy()
    for variant in variants.values():
        variant.step()
        variant.step()
    samples = time_interleaved({name: variant.step for name, variant in variants.items()}, options.repeats)
    control = Control.from_samples(original, samples[original], samples.pop(COPY)).to_json()
    rows = {name: {**summarize(samples[name]), "saved_bytes": saved[name]} for name in samples}
    print(f"{library} {size}, batch {options.batch_size}, {options.img_size} px, {options.dtype}")
    for name, variant in rows.items():
        quartiles = f"{variant['q1_ms']:.0f} - {variant['q3_ms']:.0f}"
        print(f"  {name:<24} {variant['median_ms']:8.1f} ms ({quartiles})  {mebibytes(variant['saved_bytes'])} saved")
        print("  " + (control_sentence(control) or f"control {control['ratio']:.3f}"))
    return {"library": library, "model": size, "correctness": passed, "variants": rows, "control": control}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the mode's options."""
    parser = argparse.ArgumentParser(prog="python -m bench fused", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="JSON file to write")
    add("--libraries", nargs="+", default=LIBRARIES[:2], choices=LIBRARIES)
    add("--models", nargs="+", type=model_name, default=["convnextv2_atto", "convnextv2_tiny"])
    add("--batch-size", type=positive_int, default=8)
    add("--img-size", type=side, default=224)
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast")
    add("--device", default="cpu")
    add("--repeats", type=positive_int, default=10, help="interleaved rounds")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add(
        "--allocator",
        choices=allocator.CHOICES,
        default="constant",
        help="of the C library; default and both: the file of the allocator as it is ends in _default_allocator",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the mode; return the exit code."""
    options = build_parser().parse_args(argv)
    device = options.device.partition(":")[0]
    reason = machine.no_gpu(device)
    if reason:
        raise UserError(reason, code=USAGE)
    try:
        return each_allocator(options.allocator, functools.partial(_run, options, device))
    except CorrectnessError as error:
        raise UserError(f"correctness check: {error}") from error


def _run(options: argparse.Namespace, device: str, mode: str) -> int:
    steps = [measure(library, size, options) for size in options.models for library in options.libraries]
    parameters = {name: value for name, value in vars(options).items() if name not in ("output", "allocator")}
    result = results.describe_run("fused", parameters, mode, device)
    for name in sorted(set(options.libraries) - {"official"}):
        result["machine"][name] = importlib.metadata.version(name)
    path = options.output
    if mode == "default":
        path = path.with_name(f"{path.stem}_default_allocator{path.suffix}")
    results.write(path, {**result, "step": steps})
    return 0
