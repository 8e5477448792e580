"""Writes the measured numbers of README.md and docs/ from the committed results, so that none is typed by hand.

python -m bench tables           # rewrite the files
python -m bench tables --check   # exit 1 if they differ from the results
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from convnextv2_kernels.benchmark import results
from convnextv2_kernels.benchmark.model_counts import count_model
from convnextv2_kernels.benchmark.report import short
from convnextv2_kernels.sizes import V2_NAMES

from . import RESULTS, ROOT
from .benchmark_tables import engines, figure6_details, figure6_summary, footnote, mib, ops, scaling
from .training_tables import training

MINKOWSKI = RESULTS / "cpu_minkowski.json"
COMPOSED = RESULTS / "cpu_composed.json"
FIGURE6 = RESULTS / "cpu_figure6.json"
FIGURE6_INTEL = RESULTS / "cpu_figure6_intel.json"
OPS = RESULTS / "cpu_ops.json"
ENGINES = RESULTS / "cpu_engines.json"
SCALING = RESULTS / "cpu_scaling.json"
FUSED = RESULTS / "cpu_fused.json"
# the same under the other allocator; the older of the two names is from before the benchmark could hold it constant
FUSED_OTHER = next(
    (path for path in (RESULTS / "cpu_fused_default_allocator.json",) if path.exists()),
    RESULTS / "cpu_fused_malloc.json",
)
FIGURE6_DEFAULT = RESULTS / "cpu_figure6_default_allocator.json"
FIGURE6_CONSTANT = RESULTS / "cpu_figure6_constant_allocator.json"
CHOICES = RESULTS / "cpu_choices.json"
CHOICES_INTEL = RESULTS / "cpu_choices_intel.json"
RESOURCES = RESULTS / "cuda_resources.json"
TRAINING = RESULTS / "training_evidence.json"
TRITON_RESOURCES = RESULTS / "triton_resources.json"


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
    for model, found in report["save"].items():
        cells = [f"{row['median_ms']:.0f} ms, {mib(row['saved_bytes'])} MiB" for row in found["variants"].values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    sizes = [f"{int(b) / 2**20:g} MiB" for b in _columns(report["chunk"])]
    lines += ["", "FCMAE step by `CONVNEXTV2_KERNELS_CHUNK_BYTES`:", "", "| model | " + " | ".join(sizes) + " |"]
    lines.append("|---" * (1 + len(sizes)) + "|")
    for model, found in report["chunk"].items():
        cells = [f"{row['median_ms']:.0f} ms" for row in found["variants"].values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    timed = [*report["products"], *report["save"].values(), *report["chunk"].values()]
    lines += ["", f"{_machine(report)}, float32{footnote(report, timed)}."]
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
    lines += ["", f"{_machine(report)}, float32{footnote(report, report['products'])}."]
    return "\n".join(lines)


def flops() -> str:
    """Table of docs/kernels/math.md: parameters and multiply-adds of every size, counted."""
    lines = [
        "| at 224 px, 19 of 49 patches visible | parameters | multiply-adds, dense | encoder, dense / packed | FCMAE, "
        "parameters | multiply-adds, packed |",
        "|---|---|---|---|---|---|",
    ]
    for name in V2_NAMES:
        c = count_model(name)
        lines.append(
            f"| {short(name)} | {_millions(c.total('parameters', c.head))} | {_giga(c.total('dense', c.head))} | "
            f"{_giga(c.total('dense'))} / {_giga(c.total('packed'))} | "
            f"{_millions(c.total('parameters', c.decoder))} | {_giga(c.total('packed', c.decoder))} |"
        )
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _giga(count: int) -> str:
    return f"{count / 1e9:.3g} G"


def _machine(report: dict) -> str:
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}"


def _columns(table: dict) -> list[str]:
    return list(next(iter(table.values()))["variants"])


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
        eager, ours, hidden = (_fastest(step["variants"], kind) for kind in ("eager", "fused", "hidden kept"))
        compiled = {n: row for n, row in step["variants"].items() if n.startswith("compile")}  # none with --no-compile
        time, gain = "not measured", "not measured"
        if compiled:
            fastest = _fastest(compiled, "compile")
            time, gain = f"{fastest['median_ms']:.0f} ms", _times(fastest, ours, "median_ms")
        lines.append(
            f"| {step['library']} {short(step['model'])} | {eager['median_ms']:.0f} ms | "
            f"{time} | **{ours['median_ms']:.0f} ms** | {_times(eager, ours, 'median_ms')} / "
            f"{gain} | {mib(eager['saved_bytes'])} / {mib(ours['saved_bytes'])} MiB "
            f"({_times(eager, ours, 'saved_bytes')}) | {hidden['median_ms']:.0f} ms, "
            f"{_times(eager, hidden, 'median_ms')}; {mib(hidden['saved_bytes'])} MiB |"
        )
    machine, parameters = report["machine"], report["parameters"]
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("timm", "transformers") if name in machine)
    lines += [
        "",
        f"{_machine(report)}, {libraries}, {parameters['dtype']}, batch {parameters['batch_size']}, "
        f"{parameters['img_size']} px, all pixels visible, the better memory format of each; "
        f"`python -m bench fused`, medians of interleaved rounds{footnote(report, report['step'])}.",
    ]
    return "\n".join(lines)


def fused_other(report: dict) -> str:
    """Table of docs/benchmarks.md: eager and fused steps under the other allocator."""
    lines = ['| training step | eager | `fuse(model)` | `save="hidden"` |', "|---|---|---|---|"]
    for step in report["step"]:
        eager, *ours = (_fastest(step["variants"], kind)["median_ms"] for kind in ("eager", "fused", "hidden kept"))
        cells = " | ".join(f"{ms:.0f} ms ({eager / ms:.2f}x)" for ms in ours)
        lines.append(f"| {step['library']} {short(step['model'])} | {eager:.0f} ms | {cells} |")
    kept = report["allocator"]["large_blocks"] == "kept"
    how = "The allocator keeps large freed blocks" if kept else "The allocator as it is by default"
    lines += ["", f"{how}{footnote(report, report['step']) if kept else _controls(report)}."]
    return "\n".join(lines)


def _controls(report: dict) -> str:
    """The footnote without the allocator, which the sentence names already."""
    silent = {**report, "machine": {**report["machine"], "device": ""}}
    return footnote(silent, report["step"])


def figure6_default() -> str:
    """Table of docs/benchmarks.md: Figure 6 as a program has it that does nothing about the allocator."""
    if not FIGURE6_DEFAULT.exists():
        return "Figure 6 with the allocator as it is by default, beside a control: not measured yet."
    return figure6_summary(results.read(FIGURE6_DEFAULT))


def host_time(report: dict) -> str:
    """Table of docs/benchmarks.md: microseconds of a block's passes before any work is done."""
    if not report.get("host"):
        return "Host time of a block: not measured yet."
    names = list(dict.fromkeys(n for h in report["host"].values() for p in h["passes"].values() for n in p["variants"]))
    lines = ["| block of one site, one thread | " + " | ".join(f"{name}, us" for name in names) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    timed = []
    for host in report["host"].values():
        for kind, found in host["passes"].items():
            timed.append(found)
            cells = [
                f"{found['variants'][name]['median_us']:.0f}" if name in found["variants"] else "" for name in names
            ]
            lines.append(f"| C={host['width']}, {kind} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{_machine(report)}{footnote(report, timed)}."])


def _fastest(rows: dict, kind: str) -> dict:
    return min((row for name, row in rows.items() if name.startswith(kind)), key=lambda row: row["median_ms"])


def _times(other: dict, ours: dict, key: str) -> str:
    return f"**{other[key] / ours[key]:.2f}x**" if key == "median_ms" else f"**{other[key] / ours[key]:.1f}x**"


def composed(report: dict) -> str:
    """Table of docs/benchmarks.md: the fused ops beside what they are composed of."""
    names = ("one op", "op by op", "PyTorch", "PyTorch, compiled")
    titles = [*(f"{name}, ms" for name in names), "saved, one op / op by op"]
    lines = [f"| forward and backward | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for row in report["rows"]:
        rows = row["variants"]
        ours = rows[names[0]]
        cells = [f"**{ours['median_ms']:.2f}**"]
        cells += [f"{rows[n]['median_ms']:.2f} ({rows[n]['median_ms'] / ours['median_ms']:.2f}x)" for n in names[1:]]
        cells.append(" / ".join(f"{rows[name]['saved_bytes'] / 1024:,.0f}" for name in names[:2]) + " KiB")
        mark = "" if row["control"]["valid"] else " (!)"
        lines.append(f"| {row['op']}, C={row['width']} s={row['side']}{mark} | {' | '.join(cells)} |")
    p, at = report["parameters"], report["machine"]
    note = (
        f"{at['cpu']}, {at['threads']} thread{'s' if at['threads'] > 1 else ''}, PyTorch {at['torch']}, float32, "
        f"{p['batch_size']} images, 19 of 49 patches visible; medians of {p['rounds']} interleaved rounds, allocator "
        "held constant; (!): a copy of op by op differs from it by more than 3 %."
    )
    return "\n".join([*lines, "", note])


def fill(text: str, content: str, section: str) -> str:
    """The text with everything between the markers of a section replaced."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def contents() -> list[tuple[str, str, str]]:
    """Document, section and text of every table; raises NotAResult where a result lacks what a table shows."""
    with results.reading(RESULTS):
        return _contents()


def _contents() -> list[tuple[str, str, str]]:
    figure6, measured_ops = results.read(FIGURE6), results.read(OPS)
    return [
        ("README.md", "figure6", figure6_summary(figure6)),
        ("README.md", "fused", fused(results.read(FUSED))),
        ("docs/benchmarks.md", "figure6", figure6_details(figure6)),
        ("docs/benchmarks.md", "figure6_constant", figure6_summary(results.read(FIGURE6_CONSTANT))),
        ("docs/benchmarks.md", "figure6_default", figure6_default()),
        ("docs/benchmarks.md", "figure6_intel", figure6_summary(results.read(FIGURE6_INTEL))),
        ("docs/benchmarks.md", "ops", ops(measured_ops)),
        ("docs/benchmarks.md", "host", host_time(measured_ops)),
        ("docs/benchmarks.md", "minkowski", figure6_details(results.read(MINKOWSKI))),
        ("docs/benchmarks.md", "composed", composed(results.read(COMPOSED))),
        ("docs/benchmarks.md", "engines", engines(results.read(ENGINES))),
        ("docs/benchmarks.md", "scaling", scaling(results.read(SCALING))),
        ("docs/benchmarks.md", "fused_malloc", fused_other(results.read(FUSED_OTHER))),
        ("docs/kernels/math.md", "flops", flops()),
        ("docs/kernels/mlp.md", "results", choices(results.read(CHOICES))),
        ("docs/kernels/mlp.md", "intel", intel_products(results.read(CHOICES_INTEL))),
        ("docs/kernels/gpu.md", "resources", resources(results.read(RESOURCES))),
        ("docs/training.md", "evidence", training(results.read(TRAINING))),
        ("docs/kernels/gpu.md", "triton", triton_resources(results.read(TRITON_RESOURCES))),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench tables", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if a document is not up to date"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the mode; return the exit code."""
    args = build_parser().parse_args(argv)
    stale: dict[str, None] = {}
    for path, section, content in contents():
        text = (ROOT / path).read_text()
        new = fill(text, content, section)
        if new != text:
            stale[path] = None
            if not args.check:
                (ROOT / path).write_text(new)
    if stale and args.check:
        print(f"not up to date with bench/results: {', '.join(stale)}; run python -m bench tables")
        return 1
    return 0
