"""Training step of other libraries' ConvNeXt V2 as they come, compiled, and after ``fuse``.

    python bench/fused_models.py --output bench/results/cpu_fused.json

A step is forward, cross-entropy and backward, in both memory formats. Before anything is timed, loss and gradients of
the fused model must agree with float64 as well as the model's own do (the gate of
``convnextv2_kernels/benchmark/gate.py``). Interleaved rounds, medians; bytes saved for backward as in the other
benchmarks. ``--libraries official`` is plain PyTorch under the official names; the others have to be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convnextv2_kernels as ck
from convnextv2_kernels.benchmark.correctness import compare, require, rounding_floor
from convnextv2_kernels.benchmark.machine import describe
from convnextv2_kernels.benchmark.memory import saved_bytes
from convnextv2_kernels.benchmark.report import mebibytes, write_report
from convnextv2_kernels.benchmark.timing import summarize, time_interleaved

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))

CLASSES = 1000
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
class Arm:
    """One way to run the step; ``run`` is the model or its compiled form."""

    model: nn.Module
    run: Callable
    images: Tensor
    labels: Tensor
    autocast: torch.dtype | None

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


def make_arms(model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace) -> dict[str, Arm]:
    arms = {}
    autocast = None if options.dtype == "float32" else getattr(torch, options.dtype)
    for name, memory_format in FORMATS.items():
        x = images.contiguous(memory_format=memory_format)
        plain = copy.deepcopy(model).to(memory_format=memory_format)
        arms[f"eager {name}"] = Arm(plain, plain, x, labels, autocast)
        if options.compile:
            compiled = copy.deepcopy(plain)
            arms[f"compile {name}"] = Arm(compiled, torch.compile(compiled), x, labels, autocast)
        for kind, save in (("fused", None), ("hidden kept", "hidden")):
            fused = copy.deepcopy(plain)
            report = ck.fuse(fused, save=save)
            arms[f"{kind} {name}"] = Arm(fused, fused, x, labels, autocast)
    print(report)
    return arms


def gate(model: nn.Module, arms: dict[str, Arm], images: Tensor, labels: Tensor, dtype: torch.dtype) -> dict:
    """Loss and gradients of two images against float64."""
    few = {name: Arm(a.model, a.model, a.images[:2], labels[:2], a.autocast) for name, a in arms.items()}
    wide = copy.deepcopy(model).double()
    truth = Arm(wide, wide, images[:2].double(), labels[:2], None).results()
    plain = [arm.results() for name, arm in few.items() if name.startswith("eager")]
    floor = rounding_floor(2 * (images.shape[2] // 4) * (images.shape[3] // 4), dtype)
    passed = {}
    for name, arm in few.items():
        if name.startswith(("fused", "hidden kept")):
            passed[name] = require(compare(truth, plain, arm.results(), floor), name)
    return passed


def measure(library: str, size: str, options: argparse.Namespace) -> dict:
    torch._dynamo.reset()
    model = make_model(library, size).to(options.device)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size, generator=generator)
    labels = torch.randint(CLASSES, (options.batch_size,), generator=generator)
    images, labels = images.to(options.device), labels.to(options.device)
    arms = make_arms(model, images, labels, options)
    passed = gate(model, arms, images, labels, getattr(torch, options.dtype))
    saved = {name: arm.saved_bytes() for name, arm in arms.items()}
    for arm in arms.values():
        arm.step()
        arm.step()
    samples = time_interleaved({name: arm.step for name, arm in arms.items()}, options.repeats)
    results = {name: {**summarize(samples[name]), "saved_bytes": saved[name]} for name in arms}
    print(f"{library} {size}, batch {options.batch_size}, {options.img_size} px, {options.dtype}")
    for name, arm in results.items():
        quartiles = f"{arm['q1_ms']:.0f} - {arm['q3_ms']:.0f}"
        print(f"  {name:<24} {arm['median_ms']:8.1f} ms ({quartiles})  {mebibytes(arm['saved_bytes'])} saved")
    return {"library": library, "model": size, "gate": passed, "arms": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES[:2], choices=LIBRARIES)
    parser.add_argument("--models", nargs="+", default=["convnextv2_atto", "convnextv2_tiny"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10, help="interleaved rounds")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    options = parser.parse_args()
    steps = [measure(library, size, options) for size in options.models for library in options.libraries]
    parameters = {name: value for name, value in vars(options).items() if name != "output"}
    versions = {name: importlib.metadata.version(name) for name in sorted(set(options.libraries) - {"official"})}
    machine = describe(options.device.partition(":")[0]) | versions
    write_report(options.output, {"machine": machine, "parameters": parameters, "step": steps})


if __name__ == "__main__":
    main()
