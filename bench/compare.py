"""Two result files side by side: ``python -m bench compare A.json B.json``, what got worse and what got better in B."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convnextv2_kernels._files import write_json
from convnextv2_kernels.benchmark import results
from convnextv2_kernels.benchmark.report import make_console
from convnextv2_kernels.benchmark.timing import control_sentence
from convnextv2_kernels.cli.exit_codes import USAGE, UserError
from convnextv2_kernels.cli.types import percentage

from .quantities import Quantity, flatten

PROG = "python -m bench compare"
# Of the machine, what times depend on and two runs of one machine may differ in.
MACHINE = ("cpu", "gpu", "threads", "torch", "environment")
# Parameters that choose which numbers are measured, or how often, and not what work one number stands for.
CHOICES = {"models", "sizes", "libraries", "step", "ops", "compile", "dense", "peak", "repeats", "quick", "time_budget"}
CHOICES |= {"output"}
LISTED = 20


@dataclass(frozen=True)
class Change:
    """One quantity in both files. ``share`` is (B - A) / A, infinite where A is 0; ``verdict`` "worse", "better",
    "unchanged" or "not comparable"."""

    key: str
    before: Quantity
    after: Quantity
    share: float
    verdict: str


def build_parser() -> argparse.ArgumentParser:
    """Parser of the comparison's own options."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Compare two result files of this benchmark, of any kind.",
        epilog="Exit code 0: nothing is worse in B; 1: something is; 2: bad input.",
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="the result before")
    parser.add_argument("b", type=Path, metavar="B.json", help="the result after")
    parser.add_argument(
        "--threshold",
        type=percentage,
        default=5.0,
        metavar="PERCENT",
        help="smallest change of what is measured with noise (times, rates, resident memory) that counts, and only if "
        "the ranges between the quartiles do not overlap (default: 5); counted bytes, calls and instructions are "
        "compared exactly",
    )
    parser.add_argument(
        "--only",
        choices=("stable", "time", "all"),
        default="all",
        help="stable: counted bytes, calls, instructions; time: what is measured with noise (default: all)",
    )
    parser.add_argument(
        "--ignore-machine", action="store_true", help="let times count although machine, software or parameters differ"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")
    return parser


def differences(a: dict, b: dict) -> list[str]:
    """What makes times of two results incomparable, one phrase each."""
    before, after = ({name: result.get("machine", {}).get(name) or None for name in MACHINE} for result in (a, b))
    for sides, result in ((before, a), (after, b)):
        sides |= {k: v for k, v in result.get("parameters", {}).items() if k not in CHOICES}
    names = dict.fromkeys([*before, *after])
    found = [f"{n}: {before.get(n)} in A, {after.get(n)} in B" for n in names if before.get(n) != after.get(n)]
    return found + [f"{side}: {text}" for side, result in (("A", a), ("B", b)) for text in invalid(result)]


def invalid(value: object) -> list[str]:
    """Controls anywhere in a result that are off: times beside them cannot be compared."""
    if isinstance(value, list):
        return [text for item in value for text in invalid(item)]
    if not isinstance(value, dict):
        return []
    control = value.get("control")
    own = [control_sentence(control)] if isinstance(control, dict) and not control["valid"] else []
    return own + [text for key, item in value.items() if key != "control" for text in invalid(item)]


def compare(a: dict[str, Quantity], b: dict[str, Quantity], threshold: float, comparable: bool) -> list[Change]:
    """Every quantity that both have, the largest change first.

    Args:
        a, b: as :func:`.quantities.flatten` returns them.
        threshold: percent, for noisy quantities.
        comparable: whether noisy quantities count; changed ones are "not comparable" otherwise.
    """
    changes = [_change(key, a[key], b[key], threshold, comparable) for key in a if key in b]
    return sorted(changes, key=lambda change: -abs(change.share))


def _change(key: str, before: Quantity, after: Quantity, threshold: float, comparable: bool) -> Change:
    difference = after.value - before.value
    share = difference / before.value if before.value else math.copysign(math.inf, difference) if difference else 0.0
    changed = difference != 0
    if before.noisy:
        apart = before.high < after.low or after.high < before.low
        changed = apart and 100 * abs(share) > threshold
    verdict = "unchanged"
    if changed:
        verdict = "better" if (difference > 0) == before.more_is_better else "worse"
        if before.noisy and not comparable:
            verdict = "not comparable"
    return Change(key, before, after, share, verdict)


def main(argv: Sequence[str]) -> int:
    """Compare, print, and return the exit code: 0 nothing worse, 1 something worse, 2 bad input."""
    args = build_parser().parse_args(argv)
    try:
        found = [results.read(path) for path in (args.a, args.b)]
        both = []
        for result, path in zip(found, (args.a, args.b), strict=True):
            with results.reading(path):
                both.append(_chosen(result, path, args.only))
        a, b = both
        if not a.keys() & b.keys():
            raise results.NotAResult(f"{args.a} and {args.b} have no number in common")
        differing = differences(*found)
        changes = compare(a, b, args.threshold, args.ignore_machine or not differing)
        only = {"A": [key for key in a if key not in b], "B": [key for key in b if key not in a]}
        if args.json is not None:
            write_json(args.json, _as_json(args, differing, changes, only))
    except OSError as error:
        raise UserError(f"--json {args.json} cannot be written: {error.strerror}", code=USAGE) from error
    _print(make_console(), args, differing, changes, only)
    return 1 if _of(changes, "worse") else 0


def _chosen(result: dict, path: Path, only: str) -> dict[str, Quantity]:
    found = flatten(result)
    if not found:
        raise results.NotAResult(f"{path} is not a result of this benchmark, expected times, bytes or counts in it")
    return {key: q for key, q in found.items() if only == "all" or q.noisy == (only == "time")}


def _of(changes: Sequence[Change], verdict: str) -> list[Change]:
    return [change for change in changes if change.verdict == verdict]


def _print(console: Console, args, differing: list[str], changes: list[Change], only: dict[str, list[str]]) -> None:
    if differing:
        meaning = "counted all the same (--ignore-machine)" if args.ignore_machine else "shown, never counted as worse"
        console.print("Warning: the two runs are not alike, times are " + meaning, style="yellow")
        for text in differing:
            console.print(f"  {text}", soft_wrap=True)
    groups = {name: _of(changes, name) for name in ("worse", "better", "not comparable")}
    styles = {"worse": "red", "better": "green", "not comparable": "yellow"}
    if any(groups.values()):
        table = Table()
        for name in ("", "quantity", "A", "B", "change"):
            table.add_column(name, justify="right" if name in ("A", "B", "change") else "left", overflow="fold")
        for name, group in groups.items():
            for c in group:
                cells = (c.key, _shown(c.before), _shown(c.after), _signed(c.share))
                table.add_row(name, *cells, style=styles[name])
            table.add_section()
        console.print(table)
    for side, keys in only.items():
        for key in keys[:LISTED]:
            console.print(f"only in {side}: {key}", soft_wrap=True)
        if len(keys) > LISTED:
            console.print(f"only in {side}: and {len(keys) - LISTED} more")
    parts = [f"{len(group)} {name}" for name, group in groups.items() if group or name != "not comparable"]
    parts.append(f"{len(_of(changes, 'unchanged'))} unchanged")
    parts += [f"{len(keys)} only in {side}" for side, keys in only.items()]
    console.print(", ".join(parts))


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %" if math.isfinite(share) else "from 0"


def _shown(quantity: Quantity) -> str:
    value = quantity.value
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if quantity.low < quantity.high:
        text += f" ({quantity.low:.4g} - {quantity.high:.4g})"
    return f"{text} {quantity.unit}"


def _as_json(args, differing: list[str], changes: list[Change], only: dict[str, list[str]]) -> dict:
    def row(change: Change) -> dict:
        share = change.share if math.isfinite(change.share) else None
        values = {"a": change.before.value, "b": change.after.value}
        return {"key": change.key, **values, "unit": change.before.unit, "change": share}

    return {
        "kind": "comparison",
        "a": args.a.name,
        "b": args.b.name,
        "threshold_percent": args.threshold,
        "only": args.only,
        "differences": differing,
        **{
            name.replace(" ", "_"): [row(change) for change in _of(changes, name)]
            for name in ("worse", "better", "not comparable")
        },
        "unchanged": len(_of(changes, "unchanged")),
        "only_in_a": only["A"],
        "only_in_b": only["B"],
    }
