"""Writes the measured numbers of README.md and docs/ from the committed results, so that none is typed by hand.

python bench/readme_tables.py           # rewrite the files
python bench/readme_tables.py --check   # exit 1 if they differ from the results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmark_tables import engines, figure6_details, figure6_summary, ops, scaling
from training_tables import training

ROOT = Path(__file__).resolve().parents[1]
FIGURE6 = ROOT / "bench" / "results" / "cpu_figure6.json"
FIGURE6_INTEL = ROOT / "bench" / "results" / "cpu_figure6_intel.json"
OPS = ROOT / "bench" / "results" / "cpu_ops.json"
ENGINES = ROOT / "bench" / "results" / "cpu_engines.json"
SCALING = ROOT / "bench" / "results" / "cpu_scaling.json"
FUSED = ROOT / "bench" / "results" / "cpu_fused.json"
FUSED_MALLOC = ROOT / "bench" / "results" / "cpu_fused_malloc.json"  # the same, pages kept by the allocator
CHOICES = ROOT / "bench" / "results" / "cpu_choices.json"
CHOICES_INTEL = ROOT / "bench" / "results" / "cpu_choices_intel.json"
RESOURCES = ROOT / "bench" / "results" / "cuda_resources.json"
TRAINING = ROOT / "bench" / "results" / "training_evidence.json"
TRITON_RESOURCES = ROOT / "bench" / "results" / "triton_resources.json"


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


def choices(report: dict) -> str:
    """Tables of docs/kernels/mlp.md: products by library, what is kept for backward, chunk sizes."""
    lines = [
        "Matrix products, GFLOP/s, warm:",
        "",
        "| rows M x width C | `[M, C] [C, 4C]`: mm / backend | weight gradient: mm / backend |",
        "|---|---|---|",
    ]
    for row in report["products"]:
        g = row["gflops"]
        lines.append(
            f"| {row['rows']} x {row['width']} | {g['mm']:.0f} / {g['backend']:.0f} | "
            f"{g['mm weight gradient']:.0f} / {g['backend weight gradient']:.0f} |"
        )
    lines += ["", "FCMAE step by `CONVNEXTV2_KERNELS_SAVE`:", "", "| model | " + " | ".join(_columns(report["save"]))]
    lines[-1] += " |"
    lines.append("|---" * (1 + len(_columns(report["save"]))) + "|")
    for model, arms in report["save"].items():
        cells = [f"{arm['median_ms']:.0f} ms, {_mib(arm['saved_bytes'])} MiB" for arm in arms.values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    sizes = [f"{int(b) / 2**20:g} MiB" for b in _columns(report["chunk"])]
    lines += ["", "FCMAE step by `CONVNEXTV2_KERNELS_CHUNK_BYTES`:", "", "| model | " + " | ".join(sizes) + " |"]
    lines.append("|---" * (1 + len(sizes)) + "|")
    for model, arms in report["chunk"].items():
        lines.append(f"| {model} | " + " | ".join(f"{arm['median_ms']:.0f} ms" for arm in arms.values()) + " |")
    machine = report["machine"]
    lines += ["", f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}, float32."]
    return "\n".join(lines)


def intel_products(report: dict) -> str:
    """Table of docs/kernels/mlp.md: MKL against oneDNN on an Intel processor."""
    kinds = ("", " input gradient", " weight gradient", " second input gradient", " second weight gradient")
    lines = [
        "Matrix products, GFLOP/s, warm, mm / oneDNN:",
        "",
        "| rows M x width C | `y W1'` | `da W1` | `da' y` | `d W2` | `d' h` |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["products"]:
        g = row["gflops"]
        cells = [f"{g[f'mm{kind}']:.0f} / {g[f'backend{kind}']:.0f}" for kind in kinds]
        lines.append(f"| {row['rows']} x {row['width']} | {' | '.join(cells)} |")
    machine = report["machine"]
    lines += ["", f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}, float32."]
    return "\n".join(lines)


def _columns(table: dict) -> list[str]:
    return list(next(iter(table.values())))


def resources(report: dict) -> str:
    """Table of docs/kernels/gpu.md: what nvcc makes of each kernel template, the largest of its instantiations."""
    archs = report["architectures"]
    lines = [
        f"nvcc {report['nvcc']}, the most of all instantiations:",
        "",
        "| kernel | source | instantiations | " + " | ".join(f"registers {a}" for a in archs) + " | spilled bytes |",
        "|---" * (4 + len(archs)) + "|",
    ]
    for name, row in report["kernels"].items():
        cells = " | ".join(str(row["registers"][a]) for a in archs)
        lines.append(f"| `{name}` | `{row['source']}` | {row['count']} | {cells} | {row['spills']} |")
    return "\n".join(lines)


def triton_resources(report: dict) -> str:
    """Table of docs/kernels/gpu.md: what Triton makes of each kernel, the largest over all that were compiled."""
    targets = report["targets"]
    lines = [
        f"Triton {report['triton']}, the most of all compiled, float64 apart:",
        "",
        "| kernel | compiled | " + " | ".join(f"registers {t}" for t in targets) + " | shared KiB | spilled | float64: "
        "registers, spilled bytes |",
        "|---" * (5 + len(targets)) + "|",
    ]
    for name, row in report["kernels"].items():
        cells = " | ".join(str(row["registers"][t]) for t in targets)
        shared, spills = max(row["shared"].values()) / 1024, sum(row["spills"].values())
        wide = "{registers}, {spills}".format(**row["float64"]) if "float64" in row else ""
        lines.append(f"| `{name}` | {row['count']} | {cells} | {shared:.0f} | {spills} | {wide} |")
    return "\n".join(lines)


def fused(report: dict) -> str:
    """Table of the README: the training step of other libraries' models before and after ``fuse``."""
    lines = [
        "| training step on a CPU | eager | compiled | `fuse(model)` | faster than eager / compiled | "
        'saved for backward, eager / fused | `save="hidden"` |',
        "|---|---|---|---|---|---|---|",
    ]
    for step in report["step"]:
        kinds = ("eager", "compile", "fused", "hidden kept")
        eager, compiled, ours, hidden = (_fastest(step["arms"], kind) for kind in kinds)
        lines.append(
            f"| {step['library']} {step['model'].removeprefix('convnextv2_')} | {eager['median_ms']:.0f} ms | "
            f"{compiled['median_ms']:.0f} ms | **{ours['median_ms']:.0f} ms** | {_times(eager, ours, 'median_ms')} / "
            f"{_times(compiled, ours, 'median_ms')} | {_mib(eager['saved_bytes'])} / {_mib(ours['saved_bytes'])} MiB "
            f"({_times(eager, ours, 'saved_bytes')}) | {hidden['median_ms']:.0f} ms, "
            f"{_times(eager, hidden, 'median_ms')}; {_mib(hidden['saved_bytes'])} MiB |"
        )
    machine, parameters = report["machine"], report["parameters"]
    lines += [
        "",
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}, timm {machine['timm']}, "
        f"transformers {machine['transformers']}, {parameters['dtype']}, batch {parameters['batch_size']}, "
        f"{parameters['img_size']} px, all pixels visible, the better memory format of each; "
        "`bench/fused_models.py`, medians of interleaved rounds.",
    ]
    return "\n".join(lines)


def fused_malloc(report: dict) -> str:
    """Table of docs/benchmarks.md: eager and fused steps where the allocator keeps its pages."""
    lines = ['| training step | eager | `fuse(model)` | `save="hidden"` |', "|---|---|---|---|"]
    for step in report["step"]:
        eager, *ours = (_fastest(step["arms"], kind)["median_ms"] for kind in ("eager", "fused", "hidden kept"))
        cells = " | ".join(f"{ms:.0f} ms ({eager / ms:.2f}x)" for ms in ours)
        lines.append(f"| {step['library']} {step['model'].removeprefix('convnextv2_')} | {eager:.0f} ms | {cells} |")
    return "\n".join(lines)


def _fastest(arms: dict, kind: str) -> dict:
    return min((arm for name, arm in arms.items() if name.startswith(kind)), key=lambda arm: arm["median_ms"])


def _times(other: dict, ours: dict, key: str) -> str:
    return f"**{other[key] / ours[key]:.2f}x**" if key == "median_ms" else f"**{other[key] / ours[key]:.1f}x**"


def fill(text: str, content: str, section: str) -> str:
    """The text with everything between the markers of a section replaced."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def main(arguments: list[str]) -> int:
    figure6 = json.loads(FIGURE6.read_text())
    stale = []
    contents = [
        ("README.md", "figure6", figure6_summary(figure6)),
        ("README.md", "fused", fused(json.loads(FUSED.read_text()))),
        ("docs/benchmarks.md", "figure6", figure6_details(figure6)),
        ("docs/benchmarks.md", "figure6_intel", figure6_summary(json.loads(FIGURE6_INTEL.read_text()))),
        ("docs/benchmarks.md", "ops", ops(json.loads(OPS.read_text()))),
        ("docs/benchmarks.md", "engines", engines(json.loads(ENGINES.read_text()))),
        ("docs/benchmarks.md", "scaling", scaling(json.loads(SCALING.read_text()))),
        ("docs/benchmarks.md", "fused_malloc", fused_malloc(json.loads(FUSED_MALLOC.read_text()))),
        ("docs/kernels/mlp.md", "results", choices(json.loads(CHOICES.read_text()))),
        ("docs/kernels/mlp.md", "intel", intel_products(json.loads(CHOICES_INTEL.read_text()))),
        ("docs/kernels/gpu.md", "resources", resources(json.loads(RESOURCES.read_text()))),
        ("docs/training.md", "evidence", training(json.loads(TRAINING.read_text()))),
        ("docs/kernels/gpu.md", "triton", triton_resources(json.loads(TRITON_RESOURCES.read_text()))),
    ]
    for path, section, content in contents:
        text = (ROOT / path).read_text()
        new = fill(text, content, section)
        if new != text:
            stale.append(path)
            if "--check" not in arguments:
                (ROOT / path).write_text(new)
    if stale and "--check" in arguments:
        print(f"not up to date with bench/results: {', '.join(stale)}; run python bench/readme_tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
