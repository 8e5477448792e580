"""The short table at the end of a run."""

from __future__ import annotations

from typing import Any

from convnextv2_kernels.benchmark.report import lines_of

MOST_LINES = 12


def _result(data: dict[str, Any], stage: str) -> dict[str, Any]:
    return data["stages"].get(stage, {}).get("result", {})


def errors_of(data: dict[str, Any]) -> dict[str, str]:
    """Failed cases of all stages, and failing tests."""
    found = {}
    for name in data["stages"]:
        found |= {f"{name}: {key}": text for key, text in _result(data, name).get("errors", {}).items()}
    return found | {f"test {key}": text for key, text in _result(data, "tests").get("failing", {}).items()}


def stage_lines(data: dict[str, Any]) -> list[str]:
    lines = []
    for name, stage in data["stages"].items():
        cases, skipped = len(_result(data, name).get("errors", {})), len(_result(data, name).get("skipped", {}))
        notes = [f"{cases} cases failed"] * bool(cases) + [f"{skipped} cases skipped"] * bool(skipped)
        notes += [stage["reason"][:110]] if "reason" in stage else []
        lines.append(f"{name:<14} {stage['status']:<8} {stage.get('seconds', 0):>6} s  {'; '.join(notes)}")
    return lines


def error_lines(data: dict[str, Any]) -> list[str]:
    found = errors_of(data)
    lines = [f"  {key}: {text[:170]}" for key, text in list(found.items())[:MOST_LINES]]
    return lines + [f"  ... and {len(found) - MOST_LINES} more"] * (len(found) > MOST_LINES)


def test_line(data: dict[str, Any]) -> list[str]:
    tests, smoke = _result(data, "tests"), _result(data, "smoke").get("checks", {})
    lines = [f"smoke: {len(smoke)} ops x dtypes conform"] if smoke else []
    triton = _result(data, "triton_smoke").get("checks", {})
    if triton:
        fused = sum(" fused" in answer for answer in triton.values())
        lines.append(f"triton smoke: {len(triton)} checks conform, {fused} of them with fused products")
    if "counts" in tests:
        counts = ", ".join(f"{count} {kind}" for kind, count in tests["counts"].items())
        lines.append(f"tests: {counts}{'; ' + tests['incomplete'] if 'incomplete' in tests else ''}")
    return lines


def rate_line(data: dict[str, Any]) -> list[str]:
    rates = _result(data, "ceilings").get("rates", {})
    return ["ceilings: " + ", ".join(f"{key} {value:.4g}" for key, value in rates.items())] if rates else []


def kernel_lines(data: dict[str, Any]) -> list[str]:
    """A line for each operator: cold microseconds and share at every stage, "!" where a target is missed; for the first
    model and batch in full, for others the convolution only. The JSON has the rest."""
    return [line for stage in ("kernels", "triton_kernels") for line in _kernel_lines(data, stage)]


def _kernel_lines(data: dict[str, Any], stage: str) -> list[str]:
    tables: dict[str, dict[str, list[str]]] = {}
    for name, row in _result(data, stage).get("kernels", {}).items():
        operator, model, rest = split_name(name)
        if name.endswith("float32") or (tables and model not in list(tables)[:1] and not operator.startswith("conv_")):
            continue
        missed = "!" if row.get("met") is False else ""
        entry = f"{rest} {row['cold_us']:.1f} ({row['copy_share_cold']:.0%}{missed})"
        tables.setdefault(model, {}).setdefault(operator, []).append(entry)
    lines = []
    for model, operators in tables.items():
        lines.append(f"{stage}, {model}: us with cold buffers (share of copy bandwidth, ! target missed)")
        lines += [f"  {operator:<28} " + "  ".join(entries) for operator, entries in operators.items()]
    return lines


def product_lines(data: dict[str, Any]) -> list[str]:
    """A line for each fused product of the MLP and for the whole, of each model and batch: at every stage its time and
    the library's, "*" where the plan fuses, "!" where it does not take the fastest."""
    tables: dict[str, dict[str, list[str]]] = {}
    for name, row in _result(data, "triton_kernels").get("products", {}).items():
        kernel, model, rest = split_name(name)
        if kernel in ("forward", "backward"):
            fused, other = row.get("fused_us"), row["library_us"]
            mark = "*" * (row["plan"] == "fused") + "!" * (not row["plan_is_fastest"])
        else:
            fused, other, mark = row["us"], row["vendor_us"], "*" * row["planned"]
        entry = f"{rest} {'-' if fused is None else f'{fused:.0f}'}{mark}/{other:.0f}"
        tables.setdefault(model, {}).setdefault(kernel, []).append(entry)
    lines = []
    for model, kernels in tables.items():
        lines.append(f"fused products, {model}: us / library's us (* fused in the plan, ! the plan is not the fastest)")
        lines += [f"  {kernel:<10} " + "  ".join(entries) for kernel, entries in kernels.items()]
    return lines


def split_name(name: str) -> tuple[str, str, str]:
    """Operator, model with batch, and the rest of a case's name."""
    words = name.split()
    batch = next(i for i, word in enumerate(words) if word[0] == "n" and word[1:].isdigit())
    return " ".join(words[: batch - 1]), " ".join(words[batch - 1 : batch + 1]), " ".join(words[batch + 1 :])


def step_lines(data: dict[str, Any]) -> list[str]:
    lines = []
    for stage, group in (("step", "eager"), ("step", "graph"), ("compile", "compile"), ("step", "backends")):
        for name, row in _result(data, stage).get(group, {}).items():
            times = ", ".join(
                f"{step}{' (' + v['run_by'] + ')' if 'run_by' in v else ''} {v['median_ms']:.2f} ms"
                for step, v in row["variants"].items()
                if v["baseline"] is None
            )
            lines.append(f"step {name}: {times}")
            lines += [f"     {text}" for text in lines_of({**row, "model": name})]
    direct = _result(data, "step").get("dense_eager_over_ours_graph", {})
    return lines + [f"step {name}: fastest dense eager / our graph {value:.2f}" for name, value in direct.items()]


def check_lines(data: dict[str, Any]) -> list[str]:
    step = _result(data, "step")
    failed = [key for key in step.get("errors", {}) if key.endswith(" check")]
    return [f"WRONG RESULTS in {key}: its times mean nothing until that is understood" for key in failed]


def other_lines(data: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in _result(data, "profile").get("steps", {}).items():
        kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row["ms_per_step_by_kind"].items())
        lines.append(
            f"profile {name}: GPU busy {row['gpu_busy_share']:.0%}, {row['kernels_per_step']:.0f} kernels, ms: {kinds}"
        )
    for tool, row in _result(data, "sanitizer").get("tools", {}).items():
        lines.append(f"{tool}: {row.get('errors', 'not run (dry run)')} errors {'; '.join(row.get('first', []))}")
    return lines


def print_report(data: dict[str, Any]) -> None:
    """Prints the whole summary."""
    print("\n" + "=" * 100)
    print(
        f"{_result(data, 'machine').get('gpu', {}).get('name')}"
        + (" DRY RUN: TIMES MEAN NOTHING" if data["dry_run"] else "")
    )
    parts = (kernel_lines, product_lines, rate_line, step_lines, other_lines, test_line, check_lines, error_lines)
    for part in (*parts, stage_lines):
        for line in part(data):
            print(line)
