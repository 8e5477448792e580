"""Tables of the benchmark's results: Figure 6, ops beside their limits, scaling. Written by ``readme_tables.py``."""

from __future__ import annotations

from convnextv2_kernels.benchmark.report import machine_line

from .scaling.report import largest_chunk

SPARSE = "sparse"
TARGETS = {"atto": 5, "tiny": 4, "base": 4}


def _mib(count: float) -> str:
    mebibytes = count / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 100 else f"{mebibytes:.1f}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _short(model: str) -> str:
    return model.removeprefix("convnextv2_")


def _arm(name: str) -> str:
    return name.removeprefix("dense ").removesuffix(" eager")


def _common(size: dict) -> dict | None:
    """The arm of the usual spelling, None where memory did not suffice for it."""
    eager = (arm for arm in size["arms"].values() if arm["variant"] and not arm["variant"]["compiled"])
    return next((arm for arm in eager if arm["variant"]["pointwise"] == "plain"), None)


def figure6_summary(report: dict) -> str:
    """The README's table: for each size the usual and the best masked dense arm against ours."""
    lines = [
        "| size | masked dense, as commonly written | masked dense, best of all variants | this library | "
        "faster than best / common | peak memory, least dense / ours | saved for backward, least dense / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in report["sizes"]:
        arms, found, usual = size["arms"], size["ratios"], _common(size)
        ours, best = arms[size["ours"]], arms[found["fastest_dense"]]
        common = f"{_rate(usual['images_per_s'])} images/s" if usual else "out of memory"
        times = f" / {usual['median_ms'] / ours['median_ms']:.1f}x" if usual else ""
        frugal = arms[found["frugal_dense"]]
        lines.append(
            f"| {_short(size['model'])} | {common} | {_rate(best['images_per_s'])} "
            f"({_arm(found['fastest_dense'])}) | **{_rate(ours['images_per_s'])}** | "
            f"**{found['throughput']:.1f}x**{times} | {_peaks(size)} | "
            f"{_mib(frugal['saved_bytes'])} / {_mib(ours['saved_bytes'])} MiB (**{found['saved']:.1f}x**) |"
        )
    left_out = [f"{_short(model)}: {reason}" for model, reason in report["left_out"].items()]
    end = f"; left out: {'; '.join(left_out)}" if left_out else ""
    compiled = {name for size in report["sizes"] for name, arm in size["arms"].items() if name.endswith(" compile")}
    eager = [_short(size["model"]) for size in report["sizes"] if not compiled & size["arms"].keys()]
    end += f"; no compiled variants: {', '.join(eager)}" if eager else ""
    lines += ["", f"{machine_line(report)}; forward and backward, medians of interleaved rounds{end}."]
    return "\n".join(lines)


def _peaks(size: dict) -> str:
    if "peak" not in size["ratios"]:
        return "not measured"
    arms, found = size["arms"], size["ratios"]
    least, ours = arms[found["least_peak_dense"]]["peak"]["bytes"], arms[size["ours"]]["peak"]["bytes"]
    return f"{_mib(least)} / {_mib(ours)} MiB (**{found['peak']:.1f}x**)"


def figure6_details(report: dict) -> str:
    """Every arm of every size, and how far each is from its target."""
    lines = [
        f"{machine_line(report)}.",
        "",
        "| size | arm | images/s | median ms | quartiles ms | saved MiB | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in report["sizes"]:
        for place, (name, arm) in enumerate(size["arms"].items()):
            bold = "**" if name == size["ours"] else ""
            peak = arm["peak"]["bytes"]
            lines.append(
                f"| {'' if place else _short(size['model'])} | {bold}{name}{bold} | {_rate(arm['images_per_s'])} | "
                f"{arm['median_ms']:.0f} | {arm['q1_ms']:.0f} - {arm['q3_ms']:.0f} | {_mib(arm['saved_bytes'])} | "
                f"{_mib(peak) if peak else ''} |"
            )
        lines += [f"| | {name} | {why} | | | | |" for name, why in size["skipped"].items()]
    lines += [
        "",
        "| size | counted GFLOP, dense / ours | time, best dense / ours | time, best eager / compiled dense | "
        "GFLOP/s of the counted work, best dense / ours | target on a CPU |",
        "|---|---|---|---|---|---|",
    ]
    for size in report["sizes"]:
        arms, found, flops = size["arms"], size["ratios"], size["flops"]
        ours, best = arms[size["ours"]]["median_ms"], arms[found["fastest_dense"]]["median_ms"]
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
    for arm in size["arms"].values():
        if arm["variant"]:
            times[arm["variant"]["compiled"]].append(arm["median_ms"])
    return f"{min(times[False]) / min(times[True]):.2f}x" if times[True] else ""


def ops(report: dict) -> str:
    """Each op and stage: ours against the fastest dense variant, and the share of its limit."""
    blocks = [f"{machine_line(report)}."]
    for model, table in report["ops"].items():
        limits = table["ceilings"]
        copies = ", ".join(f"{c['gbytes']:.0f} ({c['traffic_bytes'] / 2**20:g} MiB)" for c in limits["copies"])
        rows = [
            f"**Ops of {model}**, forward and backward. This machine at most: {limits['gflops']:.0f} GFLOP/s "
            f"({limits['product']}); GB/s by bytes moved: {copies}.",
            "",
            "| op | shape | sparse ms | share of the limit | dense ms (variant) | dense / sparse | GFLOP/s | GB/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in table["rows"]:
            ours, name = row["arms"][SPARSE], row["fastest_dense"]
            rows.append(
                f"| {row['op']} | C={row['width']} s={row['side']} | {ours['median_ms']:.3f} | "
                f"{100 * ours['share']:.0f} % {ours['bound']} | {row['arms'][name]['median_ms']:.3f} ({name}) | "
                f"{row['time_ratio']:.1f} | {ours['rates']['gflops']:.0f} | {ours['rates']['gbytes']:.1f} |"
            )
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def engines(report: dict) -> str:
    """The depthwise convolution by other sparse engines, where they were installed."""
    names = [name for row in _engine_rows(report) for name, arm in row["arms"].items() if "comparable" in arm]
    names = list(dict.fromkeys(names))
    lines = [
        "| depthwise 7x7, forward and backward | ours | dense, faster layout | " + " | ".join(names) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in _engine_rows(report):
        ours, dense = row["arms"][SPARSE]["median_ms"], row["arms"][row["fastest_dense"]]["median_ms"]
        cells = [f"C={row['width']} s={row['side']}", f"**{ours:.2f} ms**", f"{dense:.2f} ({dense / ours:.1f}x)"]
        for name in names:
            arm = row["arms"].get(name)
            times = f" ({arm['median_ms'] / ours:.0f}x)" if arm and arm["comparable"] else ""
            cells.append(f"{arm['median_ms']:.1f}{times}" if arm else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{machine_line(report)}."])


def _engine_rows(report: dict) -> list[dict]:
    rows = [row for table in report["ops"].values() for row in table["rows"]]
    return [row for row in rows if any("comparable" in arm for arm in row["arms"].values())]


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
        f"{_short(p['model'])}, {machine_line(report)}; of these one varies at a time.",
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
        ours, dense = point["arms"][SPARSE], point["arms"].get("dense")
        chunk = largest_chunk(ours) or 0
        lines.append(
            f"| {form.format(point[series['axis']])} | {point['visible_pixels']:,} | {ours['median_ms']:.0f} "
            f"({point['ideal']['median_ms']:.0f}) | {'' if dense is None else format(dense['median_ms'], '.0f')} | "
            f"{_mib(ours['saved_bytes'])} ({'' if dense is None else _mib(dense['saved_bytes'])}) | "
            f"{_mib(ours['working_bytes'])} | {_mib(chunk)} |"
        )
    return lines
