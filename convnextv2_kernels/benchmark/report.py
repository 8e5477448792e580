"""Tables of the training step on the terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.table import Table

from .._files import atomic_file
from .._progress import Screen
from . import allocator
from .step import NOT_REQUESTED, peak_of
from .timing import control_sentence
from .variants import MASK_RATIO

WIDTH_IN_FILES = 120
COLUMNS = (
    "model",
    "variant",
    "execution",
    "batch_size",
    "median_ms",
    "q1_ms",
    "q3_ms",
    "rounds",
    "images_per_s",
    "saved_bytes",
    "peak_bytes",
    "control_ratio",
    "valid",
)


def make_console(stderr: bool = False) -> Screen:
    """A console whose tables are not squeezed where the output is no terminal."""
    console = Screen(stderr)
    return console if console.is_terminal else Screen(stderr, width=WIDTH_IN_FILES)


def machine_line(result: dict) -> str:
    """What a result was measured on, and with which settings."""
    machine, p = result["machine"], result["parameters"]
    hardware = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return (
        f"{hardware}, PyTorch {machine['torch']}, {p['dtype']}, batch {p['batch_size']}, {p['img_size']} px, "
        f"mask ratio {p.get('mask_ratio', MASK_RATIO):g}"
    )


def mebibytes(count: float | None) -> str:
    """Bytes for people; nothing for None."""
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def short(name: str) -> str:
    """A size's name as people say it, such as "atto"."""
    return name.removeprefix("convnextv2_")


def csv_rows(result: dict) -> list[dict]:
    """One row for each size and variant."""
    found = []
    for size in result["sizes"]:
        control = size.get("control")
        for name, variant in size["variants"].items():
            row = {"model": size["model"], "variant": name, "batch_size": result["parameters"]["batch_size"]}
            row |= {key: variant[key] for key in ("execution", "median_ms", "q1_ms", "q3_ms", "saved_bytes")}
            row |= {"rounds": len(variant["samples_ms"]), "peak_bytes": peak_of(variant)}
            row["images_per_s"] = round(variant["images_per_s"], 3)
            row |= {"control_ratio": control and control["ratio"], "valid": control and control["valid"]}
            found.append(row)
    return found


def write_csv(path: Path, result: dict) -> None:
    """Write the rows, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv_rows(result))
    with atomic_file(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def title(result: dict) -> str:
    """What was measured, on what, in one line."""
    return f"FCMAE, forward and backward: {machine_line(result)}"


def print_allocator(console: Screen, result: dict) -> None:
    """What a reader of CPU times must know of the allocator."""
    text = allocator.sentence(result["allocator"]) if result["machine"]["device"] == "cpu" else None
    if text:
        console.print(f"Note: {text}.", soft_wrap=True)


def print_steps(console: Screen, result: dict, steps: list[dict]) -> None:
    """Table of every variant of each step or size, then a few lines for each."""
    console.print(title(result))
    table = Table()
    for name in ("size", "variant", "images/s", "median ms", "quartiles ms", "saved", "peak"):
        table.add_column(name, justify="left" if name in ("size", "variant") else "right", no_wrap=True)
    for step in steps:
        for place, (name, row) in enumerate(step["variants"].items()):
            table.add_row(
                "" if place else short(step["model"]),
                name,
                f"{row['images_per_s']:.1f}",
                f"{row['median_ms']:.1f}",
                f"{row['q1_ms']:.1f} - {row['q3_ms']:.1f}",
                mebibytes(row["saved_bytes"]),
                mebibytes(peak_of(row)),
                style="bold" if name == step["ours"] else None,
                end_section=place == len(step["variants"]) - 1,
            )
    console.print(table)
    for step in steps:
        for text in lines_of(step):
            console.print(f"{short(step['model'])}: {text}")
    print_allocator(console, result)
    console.print()


def print_engine(console: Screen, result: dict) -> None:
    """Whether the paper's engine was measured here."""
    engine = result["engine"]
    if engine["note"]:
        console.print(f"{engine['name']}: {engine['note']}.", soft_wrap=True)


def require_steps(result: dict, steps: list[dict]) -> None:
    """Show steps to nobody: raises what is wrong with a result that a file held, before anything else is measured."""
    silent = Screen()
    with silent.capture():
        print_steps(silent, result, steps)
    csv_rows({**result, "sizes": steps})


def lines_of(step: dict) -> list[str]:
    """Ratios, control and what was left out of one step, in words."""
    found = [sentence(step), *_engine_lines(step), _control_line(step)]
    unknown = {f"peak of {name}": (row["peak"] or {}).get("reason") for name, row in step["variants"].items()}
    for name, reason in {**step["skipped"], **unknown}.items():
        if reason and reason != NOT_REQUESTED:
            found.append(f"{name} skipped: {reason}")
    return [text for text in found if text]


def sentence(step: dict) -> str:
    """The ratios of one step in words."""
    found = step["ratios"]
    if not found:
        return "no masked dense variant was measured"
    text = (
        f"{step['ours']} has {found['throughput']:.2f} times the throughput of the fastest dense variant "
        f"({found['fastest_dense'].removeprefix('dense ')})"
    )
    if "throughput_graph" in found:
        both = ", ".join(f"{kind} {found[f'throughput_{kind}']:.2f}" for kind in ("eager", "graph"))
        text += f" (like with like: {both})"
    if "saved" in found:
        text += f" and saves {found['saved']:.1f} times fewer bytes"
    if "peak" in found:
        text += f"; its peak is {found['peak']:.1f} times lower"
    return text


def _engine_lines(step: dict) -> list[str]:
    """Other engines of the step beside ours and beside the fastest dense variant."""
    rows, found = step["variants"], []
    for name, row in rows.items():
        if row.get("engine") and step["ratios"]:
            dense = rows[step["ratios"]["fastest_dense"]]["median_ms"] / row["median_ms"]
            ours = row["median_ms"] / rows[step["ours"]]["median_ms"]
            found.append(
                f"{name} has {dense:.2f} times the throughput of the fastest dense variant; ours {ours:.1f} times its"
            )
    return found


def _control_line(step: dict) -> str:
    control = step.get("control")
    warning = control_sentence(control)
    if warning:
        return warning
    return f"control: a copy of {control['of'].removeprefix('dense ')} takes {control['ratio']:.3f} times its time"
