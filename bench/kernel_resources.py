"""Registers, shared memory and spills of every CUDA kernel, as nvcc reports them; needs no GPU.

    python -m bench resources cuda            # a table
    python -m bench resources cuda --write    # and bench/results/cuda_resources.json, for docs/kernels/gpu.md

A source is compiled again only when it or a header changed (``build/resources``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convnextv2_kernels._files import read_json, write_json
from convnextv2_kernels.errors import FileError

from . import RESULTS, ROOT

ARCHITECTURES = tuple(gpu["name"] for gpu in json.loads((ROOT / "csrc" / "architectures.json").read_text())["cuda"])
RESULT = RESULTS / "cuda_resources.json"
_CACHE = ROOT / "build" / "resources"
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")


def nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in candidates if path and Path(path).exists()), None)


def sources() -> list[Path]:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    return [ROOT / "csrc" / line.split()[1] for line in lines if line.startswith("cuda ")]


def source_name(source: Path) -> str:
    return source.relative_to(ROOT / "csrc" / "cuda").as_posix()


def parse(text: str) -> list[dict]:
    """Rows ``{kernel, arch, registers, shared, stack, spills}`` (bytes) of ptxas's report."""
    rows: list[dict] = []
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            rows.append({"kernel": match[1], "arch": match[2]})
        elif rows and (match := _SPILLS.search(line)) and "spills" not in rows[-1]:
            rows[-1] |= {"stack": int(match[1]), "spills": int(match[2]) + int(match[3])}
        elif rows and (match := _USED.search(line)) and "registers" not in rows[-1]:
            shared = _SHARED.search(match[2])
            rows[-1] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return rows


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |cnx::cuda::|\(anonymous namespace\)::|\(.*\)$", "", n) for n in done.stdout.splitlines()]


def measure(source: Path) -> list[dict]:
    """Rows of one source for all architectures; from the cache where nothing changed."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("no nvcc was found (PATH, CUDA_HOME, /usr/local/cuda)")
    csrc = ROOT / "csrc"
    options = ["-std=c++20", f"-I{csrc / 'include'}", "-O3", "-lineinfo", "-Xptxas", "-v"]
    options += [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    digest = hashlib.sha256(" ".join(options).encode() + source.read_bytes())
    for header in sorted([*csrc.glob("include/**/*.h"), *csrc.glob("cuda/**/*.h"), *csrc.glob("cuda/**/*.cuh")]):
        digest.update(header.read_bytes())
    cached = _CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.json"
    if cached.exists():
        with contextlib.suppress(FileError):  # compiled again
            return read_json(cached)
    _CACHE.mkdir(parents=True, exist_ok=True)
    command = [compiler, *options, "-c", str(source), "-o", str(cached.with_suffix(".o"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {source_name(source)}:\n{done.stderr}")
    rows = parse(done.stderr + done.stdout)
    for row, name in zip(rows, demangle([row["kernel"] for row in rows]), strict=True):
        row |= {"kernel": name, "source": source_name(source)}
    write_json(cached, rows)
    cached.with_suffix(".o").unlink()
    return rows


def measure_all(workers: int | None = None) -> list[dict]:
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return [row for rows in pool.map(measure, sources()) for row in rows]


def template_name(kernel: str) -> str:
    return kernel.split("<", 1)[0]


def summary(rows: list[dict]) -> dict:
    """By kernel template, the largest figures of its instantiations; what is committed."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[template_name(row["kernel"])].append(row)
    kernels = {}
    for name, members in sorted(groups.items()):
        most = {a: max((m["registers"] for m in members if m["arch"] == a), default=0) for a in ARCHITECTURES}
        kernels[name] = {
            "source": members[0]["source"],
            "count": len(members) // len(ARCHITECTURES),
            "registers": most,
            "spills": sum(m["spills"] for m in members),
        }
    return {"nvcc": nvcc_release(), "architectures": ARCHITECTURES, "kernels": kernels}


def nvcc_release() -> str:
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ", 1)[1].split(",", 1)[0]


def table(report: dict) -> str:
    lines = [f"{'kernel':<34}{'count':>6}" + "".join(f"{a + ' regs':>12}" for a in ARCHITECTURES) + f"{'spills':>8}"]
    for name, row in report["kernels"].items():
        registers = "".join(f"{row['registers'][a]:>12}" for a in ARCHITECTURES)
        lines.append(f"{name:<34}{row['count']:>6}{registers}{row['spills']:>8}")
    return "\n".join(lines)


def spills(report: dict) -> bool:
    """Whether any kernel spills registers."""
    return any(row["spills"] for row in report["kernels"].values())


def write(report: dict) -> None:
    """Write the committed result."""
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
