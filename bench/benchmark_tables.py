"""Tables of the benchmark's results: Figure 6, ops beside their limits, scaling. Written by :mod:`bench.tables`."""

from __future__ import annotations

from collections.abc import Iterable

from convnextv2_kernels.benchmark import allocator
from convnextv2_kernels.benchmark.report import machine_line
from convnextv2_kernels.benchmark.report import short as _short
from convnextv2_kernels.benchmark.step import peak_of
from convnextv2_kernels.benchmark.timing import control_sentence
from convnextv2_kernels.benchmark.variants import SPARSE

from .scaling.report import largest_chunk

TARGETS = {"atto": 5, "tiny": 4, "base": 4}


def caveats(report: dict, timed: Iterable[dict]) -> list[str]:
    """What a reader of the times must know: an allocator that was not held constant, and controls missing or off.

    ``timed`` are the parts of the report with a control of their own: steps, sizes, rows, series."""
    found = []
    if report["machine"].get("device", "cpu") == "cpu":
        found.append(allocator.sentence(report["allocator"]))
    found += [control_sentence(part.get("control")) for part in timed]
    return list(dict.fromkeys(text for text in found if text))


def footnote(report: dict, timed: Iterable[dict]) -> str:
    """The same as the end of a sentence, empty where there is nothing to know."""
    return "".join(f"; {text}" for text in caveats(report, timed))


def mib(count: float) -> str:
    """Bytes for a table."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 100 else f"{mebibytes:.1f}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _variant(name: str) -> str:
    return name.removeprefix("dense ").removesuffix(" eager")


def _common(size: dict) -> dict | None:
    """The variant of the usual spelling, None where memory did not suffice for it."""
    eager = (row for row in size["variants"].values() if row["baseline"] and row["execution"] == "eager")
    return next((row for row in eager if row["baseline"]["pointwise"] == "plain"), None)


def figure6_summary(report: dict) -> str:
    """The README's table: for each size the usual and the best masked dense variant against ours."""
    lines = [
        "| size | masked dense, as commonly written | masked dense, best of all variants | this library | "
        "faster than best / common | peak memory, least dense / ours | saved for backward, least dense / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in report["sizes"]:
        rows, found, usual = size["variants"], size["ratios"], _common(size)
        ours, best = rows[size["ours"]], rows[found["fastest_dense"]]
        common = f"{_rate(usual['images_per_s'])} images/s" if usual else "out of memory"
        times = f" / {usual['median_ms'] / ours['median_ms']:.1f}x" if usual else ""
        frugal = rows[found["frugal_dense"]]
        lines.append(
            f"| {_short(size['model'])} | {common} | {_rate(best['images_per_s'])} "
            f"({_variant(found['fastest_dense'])}) | **{_rate(ours['images_per_s'])}** | "
            f"**{found['throughput']:.1f}x**{times} | {_peaks(size)} | "
            f"{mib(frugal['saved_bytes'])} / {mib(ours['saved_bytes'])} MiB (**{found['saved']:.1f}x**) |"
        )
    left_out = [f"{_short(model)}: {reason}" for model, reason in report["left_out"].items()]
    end = f"; left out: {'; '.join(left_out)}" if left_out else ""
    compiled = {n for size in report["sizes"] for n, row in size["variants"].items() if row["execution"] == "compile"}
    eager = [_short(size["model"]) for size in report["sizes"] if not compiled & size["variants"].keys()]
    end += f"; no compiled variants: {', '.join(eager)}" if eager else ""
    lines += [
        "",
        f"{machine_line(report)}; forward and backward, medians of interleaved rounds{end}"
        f"{footnote(report, report['sizes'])}.",
    ]
    return "\n".join(lines)


def _peaks(size: dict) -> str:
    if "peak" not in size["ratios"]:
        return "not measured"
    rows, found = size["variants"], size["ratios"]
    least, ours = rows[found["least_peak_dense"]]["peak"]["bytes"], rows[size["ours"]]["peak"]["bytes"]
    return f"{mib(least)} / {mib(ours)} MiB (**{found['peak']:.1f}x**)"


def figure6_details(report: dict) -> str:
    """Every variant of every size, and how far each is from its target."""
    lines = [
        f"{machine_line(report)}.",
        "",
        "| size | variant | images/s | median ms | quartiles ms | saved MiB | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in report["sizes"]:
        for place, (name, row) in enumerate(size["variants"].items()):
            bold = "**" if name == size["ours"] else ""
            peak = peak_of(row)
            lines.append(
                f"| {'' if place else _short(size['model'])} | {bold}{name}{bold} | {_rate(row['images_per_s'])} | "
                f"{row['median_ms']:.0f} | {row['q1_ms']:.0f} - {row['q3_ms']:.0f} | {mib(row['saved_bytes'])} | "
                f"{mib(peak) if peak else ''} |"
            )
        lines += [f"| | {name} | {why} | | | | |" for name, why in size["skipped"].items()]
    lines += [
        "",
        "| size | counted GFLOP, dense / ours | time, best dense / ours | time, best eager / compiled dense | "
        "GFLOP/s of the counted work, best dense / ours | target on a CPU |",
        "|---|---|---|---|---|---|",
    ]
    for size in report["sizes"]:
        rows, found, flops = size["variants"], size["ratios"], size["flops"]
        ours, best = rows[size["ours"]]["median_ms"], rows[found["fastest_dense"]]["median_ms"]
        target = TARGETS.get(_short(size["model"]))
        verdict = "" if target is None else f"{target}x: {'met' if found['throughput'] >= target else 'missed'}"
        lines.append(
            f"| {_short(size['model'])} | {1e-9 * flops['dense']:.0f} / {1e-9 * flops['sparse']:.0f} "
            f"({flops['dense'] / flops['sparse']:.2f}x) | {found['throughput']:.2f}x | {_compiling(size)} | "
            f"{1e-6 * flops['dense'] / best:.0f} / {1e-6 * flops['sparse'] / ours:.0f} | {verdict} |"
        )
    return "\n".join(lines)


def _compiling(size: dict) -> str:
    """What compiling the dense network gains."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for row in size["variants"].values():
        if row["baseline"] and row["execution"] != "graph":
            times[row["execution"] == "compile"].append(row["median_ms"])
    return f"{min(times[False]) / min(times[True]):.2f}x" if times[True] else ""


def ops(report: dict) -> str:
    """Each op and stage: ours against the fastest dense variant, and the share of its limit."""
    timed = [row for table in report["ops"].values() for row in table["rows"]]
    blocks = [f"{machine_line(report)}{footnote(report, timed)}."]
    for model, table in report["ops"].items():
        limits = table["ceilings"]
        copies = ", ".join(f"{c['gbytes']:.0f} ({c['traffic_bytes'] / 2**20:g} MiB)" for c in limits["copies"])
        lines = [
            f"**Ops of {model}**, forward and backward. This machine at most: {limits['gflops']:.0f} GFLOP/s "
            f"({limits['product']}); GB/s by bytes moved: {copies}.",
            "",
            "| op | shape | sparse ms | share of the limit | dense ms (variant) | dense / sparse | GFLOP/s | GB/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in table["rows"]:
            ours, name = row["variants"][SPARSE], row["fastest_dense"]
            lines.append(
                f"| {row['op']} | C={row['width']} s={row['side']} | {ours['median_ms']:.3f} | "
                f"{100 * ours['share']:.0f} % {ours['bound']} | {row['variants'][name]['median_ms']:.3f} ({name}) | "
                f"{row['time_ratio']:.1f} | {ours['rates']['gflops']:.0f} | {ours['rates']['gbytes']:.1f} |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def engines(report: dict) -> str:
    """The depthwise convolution by other sparse engines, where they were installed."""
    names = [
        name for row in _engine_rows(report) for name, variant in row["variants"].items() if "comparable" in variant
    ]
    names = list(dict.fromkeys(names))
    lines = [
        "| depthwise 7x7, forward and backward | ours | dense, faster layout | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in _engine_rows(report):
        ours, dense = row["variants"][SPARSE]["median_ms"], row["variants"][row["fastest_dense"]]["median_ms"]
        cells = [f"C={row['width']} s={row['side']}", f"**{ours:.2f} ms**", f"{dense:.2f} ({dense / ours:.1f}x)"]
        for name in names:
            variant = row["variants"].get(name)
            times = f" ({variant['median_ms'] / ours:.0f}x)" if variant and variant["comparable"] else ""
            cells.append(f"{variant['median_ms']:.1f}{times}" if variant else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{machine_line(report)}{footnote(report, _engine_rows(report))}."])


def _engine_rows(report: dict) -> list[dict]:
    rows = [row for table in report["ops"].values() for row in table["rows"]]
    return [row for row in rows if any("comparable" in variant for variant in row["variants"].values())]


_AXES = {
    "batch_size": ("batch size", "{:g}"),
    "img_size": ("image size", "{:g} px"),
    "mask_ratio": ("mask ratio", "{:g}"),
}
_VERDICT = {True: "yes", False: "no", None: "noise hides it"}


def scaling(report: dict) -> str:
    """The line through the points of each axis, every point, and the chunk of hidden activations."""
    p = report["parameters"]
    lines = [
        f"{_short(p['model'])}, {machine_line(report)}; of these one varies at a time"
        f"{footnote(report, report['series'])}.",
        "",
        "| by | quantity | fixed + per million visible pixels | exponent (ideal) | R2 | most over the ideal | linear |",
        "|---|---|---|---|---|---|---|",
    ]
    for series in report["series"]:
        for name, what, unit, scale in (("median_ms", "time", "ms", 1.0), ("saved_bytes", "saved", "MiB", 2.0**20)):
            fit = series["fit"].get(name)
            if fit is None:
                continue  # too few points for a line
            lines.append(
                f"| {_AXES[series['axis']][0]} | {what} | {round(fit['intercept'] / scale, 1) or 0.0:.1f} + "
                f"{1e6 * fit['slope'] / scale:.0f} {unit} | {fit['exponent']:.2f} ({fit['ideal_exponent']:.2f}) | "
                f"{fit['r2']:.4f} | {fit['most_over_ideal']:.2f} | {_VERDICT[fit['linear']]}, within "
                f"{fit['tolerance']:.0%} |"
            )
    for series in report["series"]:
        lines += ["", *_points(series)]
        if "hidden_chunk" in series:
            verdict = series["hidden_chunk"]
            bounded = "bounded" if verdict["bounded"] else "not shown to be bounded"
            lines += ["", f"Hidden chunk: {bounded}; {verdict['reason']}."]
    return "\n".join(lines)


def _points(series: dict) -> list[str]:
    name, form = _AXES[series["axis"]]
    lines = [
        f"| {name} | visible pixels | ours ms (ideal) | masked dense ms | saved MiB (dense) | working MiB | "
        "hidden chunk MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in series["points"]:
        ours, dense = point["variants"][SPARSE], point["variants"].get("dense")
        chunk = largest_chunk(ours) or 0
        lines.append(
            f"| {form.format(point[series['axis']])} | {point['visible_pixels']:,} | {ours['median_ms']:.0f} "
            f"({point['ideal']['median_ms']:.0f}) | {'' if dense is None else format(dense['median_ms'], '.0f')} | "
            f"{mib(ours['saved_bytes'])} ({'' if dense is None else mib(dense['saved_bytes'])}) | "
            f"{mib(ours['working_bytes'])} | {mib(chunk)} |"
        )
    return lines
