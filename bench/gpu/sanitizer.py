"""compute-sanitizer over every op: memory errors, then races in shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from .results import Recorder
from .runner import run_logged
from .setting import Setting, Skip

TOOLS = ("memcheck", "racecheck")
OPTIONS = ("--kernel-regex", "--kernel-name", "--filter")  # as later and earlier versions spell it
MAX_REPORTED = 6


def binary() -> str | None:
    """Path of compute-sanitizer, or None."""
    found = shutil.which("compute-sanitizer")
    return found or next((str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None)


def own_kernels_only(path: str) -> list[str]:
    """The option that restricts it to this library's kernels, as this version spells it; none if it knows none."""
    text = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=30).stdout
    return next(([option, "kns=cnx"] for option in OPTIONS if re.search(rf"{option}\b", text)), [])


def parse(text: str) -> dict:
    """Number of errors, None where it did not come to an end, and the first lines of the first ones."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    lines = [line.lstrip("= ").strip() for line in text.splitlines() if line.startswith("=========")]
    first = [line for line in lines if re.match(r"(Invalid|Error|Program hit|Race|Misaligned|Uninit)", line)]
    return {"errors": int(summary[-1]) if summary else None, "first": first[:MAX_REPORTED]}


def run(setting: Setting, recorder: Recorder) -> None:
    path = binary()
    if path is None and not setting.dry_run:
        raise Skip("compute-sanitizer is not on this machine")
    script = [sys.executable, "-m", "bench.gpu.every_op", setting.to_json()]
    only = [] if setting.dry_run else own_kernels_only(path)
    recorder.put(restricted_to_own_kernels=bool(only))

    def case(tool: str) -> dict:
        log = setting.folder / f"{tool}.log"
        log.unlink(missing_ok=True)
        # the dry run has no GPU to check, and runs the script alone
        command = script if setting.dry_run else [path, "--tool", tool, *only, *script]
        limit = setting.remaining() - 3
        # one allocation per tensor: in a larger block, accesses past the end of a tensor would go unnoticed
        code = run_logged(command, log, setting, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        text = log.read_text(errors="replace")
        if code is None:
            raise Skip(f"not done after {limit:.0f} s")
        if "calls: " not in text:
            raise RuntimeError(f"the script did not finish: {(text.strip().splitlines() or [''])[-1][:200]}")
        return {"exit_code": code, **({} if setting.dry_run else parse(text))}

    for tool in TOOLS[:1] if setting.dry_run else TOOLS:
        recorder.case("tools", tool, lambda tool=tool: case(tool), needs=15, limit=setting.remaining() + 30)
