"""Found numbers against the baseline: what is worse, what is better, what cannot be compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SECTIONS = ("step", "op", "host", "instructions", "instructions_c_library")


@dataclass(frozen=True)
class Rule:
    """How much a quantity may grow, as a share of the baseline, and which software must be the same to compare it."""

    tolerance: float
    reason: str
    needs: tuple[str, ...] = ()


_EXACT = "a count that every run repeats exactly"
RULES = {
    "saved_bytes": Rule(0.0, _EXACT),
    "own_calls": Rule(0.0, _EXACT),
    "peak_bytes": Rule(0.0, _EXACT, ("torch",)),
    "allocated_bytes": Rule(0.0, _EXACT, ("torch",)),
    "aten_calls": Rule(0.0, _EXACT, ("torch",)),
    "other_calls": Rule(0.0, _EXACT, ("torch",)),
    "python_calls": Rule(0.0, _EXACT, ("torch", "python")),
    "dispatches": Rule(0.0, _EXACT, ("torch",)),
    "instructions": Rule(0.01, "minor versions of a compiler allot registers differently", ("compiler", "isa")),
}


@dataclass
class Verdict:
    """One sentence for each finding, and the number of quantities that were compared."""

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0
    sections: Counter = field(default_factory=Counter)

    def compared_in(self, section: str) -> int:
        """How many quantities of a section were compared."""
        return self.sections[section]


def flat(result: dict) -> dict[str, int]:
    """``{"section / name / quantity": number}`` of a result of the gate."""
    return {
        f"{section} / {name} / {quantity}": number
        for section in SECTIONS
        for name, numbers in result.get(section, {}).items()
        for quantity, number in numbers.items()
    }


def rule_of(key: str) -> Rule:
    """The rule for a key of :func:`flat`."""
    section, quantity = key.split(" / ")[0], key.split(" / ")[-1]
    rule = RULES[quantity]
    if section == "instructions_c_library":
        return Rule(rule.tolerance, rule.reason, (*rule.needs, "c_library"))
    return rule


def differing(needs: tuple[str, ...], before: dict[str, str], now: dict[str, str]) -> str | None:
    """Why quantities that need the same software cannot be compared, or None."""
    for name in needs:
        old, new = before.get(name, "unknown"), now.get(name, "unknown")
        if _relevant(name, old) != _relevant(name, new):
            return f"{name}: baseline is {old}, here {new}"
    return None


def _relevant(name: str, version: str) -> str:
    """Minor version of PyTorch and Python, major one of the compiler, all of the rest."""
    parts = version.split(".")
    return ".".join(parts[: {"torch": 2, "python": 2, "compiler": 1}.get(name, len(parts))])


def judge(baseline: dict, found: dict, left_out: dict[str, str]) -> Verdict:
    """Compare two results of the gate; ``left_out`` has for a section that was not measured the reason."""
    before, now = flat(baseline), flat(found)
    verdict, excused = Verdict(), Counter()
    for key in sorted(before.keys() | now.keys()):
        rule = rule_of(key)
        section = key.split(" / ")[0]
        reason = left_out.get(section) or differing(rule.needs, baseline["software"], found["software"])
        if reason is not None:
            excused[f"{key.split(' / ')[-1]}: {reason}"] += 1
        elif key not in now:
            verdict.worse.append(f"{key}: in the baseline ({before[key]:,}), but it was not measured")
        elif key not in before:
            verdict.worse.append(f"{key}: measured ({now[key]:,}), but not in the baseline")
        else:
            verdict.compared += 1
            verdict.sections[section] += 1
            _compare(key, rule, before[key], now[key], verdict)
    verdict.notes += [f"not compared: {count} x {reason}" for reason, count in sorted(excused.items())]
    return verdict


def _compare(key: str, rule: Rule, before: int, now: int, verdict: Verdict) -> None:
    slack = int(rule.tolerance * before)
    if now > before + slack:
        tolerance = f"{100 * rule.tolerance:g} %, {rule.reason}"
        verdict.worse.append(
            f"{key}: baseline {before:,}, found {now:,}, allowed up to {before + slack:,} (tolerance {tolerance})"
        )
    elif now < before - slack:
        verdict.better.append(f"{key}: baseline {before:,}, found {now:,}")
