"""Breaks kernels, layout and schedule on purpose and shows that the tests notice.

    python tools/mutations.py                    # every mutation, by the tests of `make test`
    python tools/mutations.py triton "cpu tap"   # those that have all words of one of these in their name
    python tools/mutations.py --long             # by those of `make test-all` too

Each mutation is made in a copy of the tree, never in place; the library it lies in is built there, and the suite that
is to notice runs up to its first failure. Before the first of a suite the suite runs unbroken. Ends with 1 if a
mutation is not noticed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EMULATED = Path("build/emulation/libconvnextv2_kernels_emulated.so")
# what a copy needs, and of what is built the objects that compile slowly
COPIED = ("convnextv2_kernels", "csrc", "python_tests", "bench", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILT = ("build/editable", "build/emulation")
HEADERS = (".h", ".inl", ".cuh")


class Suite(NamedTuple):
    """Tests that are to notice, the variables they run with, and the command that builds what they test."""

    tests: tuple[str, ...]
    environment: Mapping[str, str] = MappingProxyType({})
    build: tuple[str, ...] = ()


FAULTS = ("python_tests/faults/test_index_tables.py", "python_tests/faults/test_misuse.py")
CONFORMANCE = ("python_tests/conformance", "python_tests/test_schedule.py", *FAULTS)
SUITES = {
    "cpu": Suite(("-k", "cpu", *CONFORMANCE), build=("-q", "build_ext", "--inplace", "--build-temp", "build/editable")),
    "cuda": Suite(
        ("-k", "cuda", *CONFORMANCE, "python_tests/backends/cuda/test_layout_kernels.py"),
        {"CONVNEXTV2_KERNELS_CUDA_EMULATION": str(EMULATED)},
        ("-q", "build_emulation", "--output", str(EMULATED)),
    ),
    "triton": Suite(("-k", "triton", *CONFORMANCE, "python_tests/backends/triton"), {"TRITON_INTERPRET": "1"}),
    "python": Suite((*CONFORMANCE, "python_tests/test_layout.py")),
}


class Mutation(NamedTuple):
    """``old`` becomes ``new`` in the one file below ``where`` that has it, once; blanks and line ends count as one.

    The name begins with the suite that is to notice."""

    name: str
    where: str
    old: str
    new: str

    @property
    def suite(self) -> Suite:
        return SUITES[self.name.split()[0]]


CPU, CUDA, TRITON = "csrc/cpu", "csrc/cuda", "convnextv2_kernels/backends/triton"
MUTATIONS = (
    Mutation(
        "cpu flipped tap: the gradient of x by taps that are not turned",
        CPU,
        "c < channels ? weight[c * taps + (flip ? taps - 1 - tap : tap)] : Acc<T>(0)",
        "c < channels ? weight[c * taps + tap] : Acc<T>(0)",
    ),
    Mutation("cpu dropped bias of the convolution", CPU, "if (p.bias) start = lanes.load(in<Acc<T>>(p.bias) + c);", ""),
    Mutation(
        "cpu wrong neighbour: patches above and below change places",
        CPU,
        "around = g.neighbours + map * 9 + up * 3;",
        "around = g.neighbours + map * 9 + (2 - up) * 3;",
    ),
    Mutation(
        "cpu GRN scale of the first image for all",
        CPU,
        "scale = in<Acc<T>>(p.scale) + blocks[b].segment * channels; walk_block<T, 0>",
        "scale = in<Acc<T>>(p.scale); walk_block<T, 0>",
    ),
    Mutation(
        "cpu GRN of LayerNorm: only the last block of rows of a segment",
        CPU,
        "add_to(each, part.get(), sums.get());",
        "std::swap_ranges(part.get(), part.get() + each, sums.get());",
    ),
    Mutation(
        "cpu GRN of LayerNorm: the weight's gradient without that of the norm",
        CPU,
        "add(0, scale * sum_of(2) + kappa * sum_of(4));",
        "add(0, scale * sum_of(2));",
    ),
    Mutation(
        "cpu GRN of LayerNorm: the gradient of the norm without LayerNorm's weight",
        CPU,
        "lanes.store(factors + channels + c, w * kappa);",
        "lanes.store(factors + channels + c, kappa);",
    ),
    Mutation("cpu LayerNorm without eps", CPU, "std::sqrt(variance + static_cast<Acc<T>>(eps))", "std::sqrt(variance)"),
    Mutation(
        "cpu wrong tap of the weight gradient",
        CPU,
        "Acc<T>* at = dw + list.tap[i] * channels + c;",
        "Acc<T>* at = dw + list.tap[list.count - 1 - i] * channels + c;",
    ),
    Mutation(
        "cuda flipped tap of the generic kernel: weights that are not turned",
        CUDA,
        "out[i] = weight[c * taps + (flip ? taps - 1 - tap : tap)];",
        "out[i] = weight[c * taps + tap];",
    ),
    Mutation(
        "cuda transposed taps in patches of side 4 and 2",
        CUDA,
        "add_product(sum[oy * kSide + ox], in, w[ty * 7 + tx])",
        "add_product(sum[oy * kSide + ox], in, w[tx * 7 + ty])",
    ),
    Mutation(
        "cuda dropped bias of the convolution",
        CUDA,
        "out.v[i] = p.bias ? static_cast<const float*>(p.bias)[warp.channel + i] : 0.0f;",
        "out.v[i] = 0.0f;",
    ),
    Mutation(
        "cuda wrong neighbour: rows by columns in the table",
        CUDA,
        "row = map_row - image * p.grid_h + place / across - p.radius;",
        "row = map_row - image * p.grid_h + place % across - p.radius;",
    ),
    Mutation(
        "cuda missing barrier: sums are added before all warps have stored theirs",
        CUDA,
        "__syncthreads(); if (block_channel >= p.channels) return;",
        "if (block_channel >= p.channels) return;",
    ),
    Mutation(
        "cuda missing barrier: the flags of a layout are counted before they are set",
        CUDA,
        "flags[id - window] = 1; } __syncthreads();",
        "flags[id - window] = 1; }",
    ),
    Mutation(
        "cuda GRN scale of the first image for all",
        CUDA,
        "if (scale) load_parameters(scale + span.segment * grid.channels + span.column, factor);",
        "if (scale) load_parameters(scale + span.column, factor);",
    ),
    Mutation(
        "cuda LayerNorm without eps",
        CUDA,
        "rsqrt(group_sum(square, lanes) / static_cast<A>(p.channels) + p.eps)",
        "rsqrt(group_sum(square, lanes) / static_cast<A>(p.channels))",
    ),
    Mutation(
        "cuda GRN of LayerNorm: the weight's gradient without that of the norm",
        CUDA,
        "dweight[c] = scale * of_z + kappa * (w * squares + b * sums);",
        "dweight[c] = scale * of_z;",
    ),
    Mutation(
        "cuda GRN of LayerNorm: rows that are left over are not summed",
        CUDA,
        "if (start < span.rows) take(start, Flag<false>{});",
        "",
    ),
    Mutation(
        "cuda wrong tap of the weight gradient",
        CUDA,
        "const int64_t touched = column + right * width + radius;",
        "const int64_t touched = column + right * width + radius - 1;",
    ),
    Mutation(
        "cuda backward without mask: a hidden neighbour is the patch itself",
        CUDA,
        "if (slot < 0) continue; const T* const source",
        "if (slot < 0) slot = map; const T* const source",
    ),
    Mutation(
        "triton GRN of LayerNorm: the bias of rows that are not there",
        TRITON,
        "y = tl.where(inside, centred * r[:, None] * w + b, 0.0)",
        "y = centred * r[:, None] * w + b",
    ),
    Mutation(
        "triton flipped tap: the gradient of x by lines of taps that are not turned",
        TRITON,
        "weight + (K - 1 - ky if FLIP else ky) * (K * C)",
        "weight + ky * (K * C)",
    ),
    Mutation(
        "triton dropped bias of the convolution",
        TRITON,
        "start = tl.load(bias + columns, mask=inside, other=0.0) + tl.zeros((BM, BC), ACC)",
        "start = tl.zeros((BM, BC), ACC)",
    ),
    Mutation(
        "triton wrong neighbour: patches above and below change places",
        TRITON,
        "((2 * RADIUS + 1) * (2 * RADIUS + 1)) + up * (2 * RADIUS + 1)",
        "((2 * RADIUS + 1) * (2 * RADIUS + 1)) + (2 * RADIUS - up) * (2 * RADIUS + 1)",
    ),
    Mutation(
        "triton GRN scale of the first image for all",
        TRITON,
        "factor = tl.load(scale + (part // splits).to(tl.int64) * H + columns, mask=held, other=0.0)[None, :]",
        "factor = tl.load(scale + columns, mask=held, other=0.0)[None, :]",
    ),
    Mutation(
        "triton LayerNorm after the convolution without eps",
        TRITON,
        "tl.sqrt(tl.sum(value * value, axis=1) / C + EPS)",
        "tl.sqrt(tl.sum(value * value, axis=1) / C)",
    ),
    Mutation(
        "triton wrong tap of the weight gradient",
        TRITON,
        "tap = tl.where(ky < K, ky * K + kx, K * K)",
        "tap = tl.where(ky < K, ky * K + (K - 1 - kx), K * K)",
    ),
    Mutation(
        "triton backward without mask: hidden pixels count as ones",
        TRITON,
        "value = widen(tl.load(source, mask=visible[:, None] & inside, other=blank))",
        "value = widen(tl.load(source, mask=visible[:, None] & inside, other=1.0))",
    ),
    Mutation(
        "cpu trusted tables: an index out of range is read", "csrc/torch/device_cpu.h", "if (!found) return;", "return;"
    ),
    Mutation(
        "cuda trusted tables: a debug build asserts nothing",
        CUDA,
        "if (i < p.count) assert(p.low <= p.entries[i] && p.entries[i] <= p.high);",
        "",
    ),
    Mutation(
        "cpu gathered rows: columns of a patch by its rows",
        "csrc/cpu/gather.inl",
        "f((slot * p.side + y) * p.side + x, first + y * line + x)",
        "f((slot * p.side + x) * p.side + y, first + y * line + x)",
    ),
    Mutation(
        "cuda gathered rows: every patch in the first column of the grid",
        CUDA,
        "* grid_w + (patch - map_row * grid_w)) * side + x",
        "* grid_w) * side + x",
    ),
    Mutation(
        "python trusted layout: its tables are not compared",
        "convnextv2_kernels/layout.py",
        "if _can_be_read(slot_of_patch): _check_contents(grid, slot_of_patch,",
        "if False: _check_contents(grid, slot_of_patch,",
    ),
    Mutation(
        "python hidden NaN: the reference's root is 0 of it",
        "convnextv2_kernels/backends/reference/norm.py",
        "other = x != 0",
        "other = x > 0",
    ),
    Mutation(
        "python wrong neighbour: rows by columns in the table",
        "convnextv2_kernels/layout.py",
        "window = (step[:, None] * padded_w + step[None, :]).reshape(-1)",
        "window = (step[None, :] * padded_w + step[:, None]).reshape(-1)",
    ),
    Mutation(
        "python gathered chunk: the rows of the first one for all",
        "convnextv2_kernels/schedule.py",
        "places = places.of_rows(chunk.r0, chunk.r1)",
        "places = places.of_rows(0, chunk.r1 - chunk.r0)",
    ),
    Mutation(
        "python residual of the block dropped",
        "convnextv2_kernels/schedule.py",
        "MLPRows(_flat(y), _flat(x), a.factors",
        "MLPRows(_flat(y), None, a.factors",
    ),
    Mutation(
        "python drop path of the first chunk's images for all, forward",
        "convnextv2_kernels/schedule.py",
        "batch.drop_path_scale[chunk.n0 : chunk.n1]",
        "batch.drop_path_scale[: chunk.n1 - chunk.n0]",
    ),
    Mutation(
        "python drop path of the first chunk's images for all, backward",
        "convnextv2_kernels/schedule.py",
        "batch.drop_path_scale.reshape(-1)[part.n0 : part.n1]",
        "batch.drop_path_scale.reshape(-1)[: part.n1 - part.n0]",
    ),
)


class CannotJudge(Exception):
    """A sentence for the user: the text is not there, a build or a suite does not run."""


def find(root: Path, mutation: Mutation) -> tuple[Path, str]:
    """The file and its broken text."""
    pattern = re.compile(r"\s+".join(map(re.escape, mutation.old.split())))
    place = root / mutation.where
    paths = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix not in (".json", ".pyc", ""))
    found = [(path, text) for path in paths if pattern.search(text := path.read_text())]
    if len(found) != 1 or len(pattern.findall(found[0][1])) != 1:
        where = ", ".join(path.relative_to(root).as_posix() for path, _ in found) or "no file"
        raise CannotJudge(f"{mutation.name}: its text must stand once below {mutation.where}, and is in {where}")
    path, text = found[0]
    return path, pattern.sub(lambda _: mutation.new, text)


def copy_tree(target: Path) -> None:
    for name in (*COPIED, *BUILT):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, target / name, symlinks=True, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, target / name)


def build(root: Path, suite: Suite, headers: bool) -> None:
    """Builds what a suite tests. Where a header changed everything is compiled, which -O1 does faster."""
    environment = {**os.environ, **({"CXXFLAGS": "-O1"} if headers else {})}
    done = subprocess.run(
        [sys.executable, "setup.py", *suite.build], cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise CannotJudge(f"setup.py {suite.build[1]} failed:\n{done.stderr[-3000:]}")


def first_failure(root: Path, suite: Suite, selection: str) -> str | None:
    """Name of the first test that fails, or how the process died; None where all pass."""
    own = {name: str(root / value) if "/" in value else value for name, value in suite.environment.items()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **own}
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, f"--selection={selection}", *suite.tests], cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    if done.returncode == 1:
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
        return failed[0] if failed else "a test without a name"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    raise CannotJudge(f"pytest {' '.join(suite.tests)} ended with {done.returncode}:\n{done.stdout[-2000:]}")


def judge(mutation: Mutation, selections: list[str]) -> bool:
    """Whether every selection notices; says so."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        root.mkdir()
        copy_tree(root)
        path, text = find(root, mutation)
        path.write_text(text)
        if mutation.suite.build:
            build(root, mutation.suite, path.suffix in HEADERS)
        noticed = {selection: first_failure(root, mutation.suite, selection) for selection in selections}
    for selection, test in noticed.items():
        verdict = f"noticed by {test}" if test else "NOT NOTICED"
        print(f"{mutation.name} [{selection}]: {verdict} ({time.perf_counter() - began:.0f} s)", flush=True)
    return all(noticed.values())


def control(suites: set[str], selections: list[str]) -> None:
    """The suites pass on the tree as it is; otherwise a failure would show nothing."""
    for name in sorted(suites):
        test = first_failure(ROOT, SUITES[name], selections[-1])
        if test is not None:
            raise CannotJudge(f"{name}: {test} fails without any mutation")
        print(f"{name}: passes unbroken", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="WORDS", help="mutations, by words of their names (default: all)")
    parser.add_argument("--long", action="store_true", help="also by all tests, not only by those of `make test`")
    parser.add_argument("--no-control", action="store_true", help="do not run the suites on the unbroken tree first")
    options = parser.parse_args(arguments)
    wanted = [m for m in MUTATIONS if not options.names or any(_has(m.name, words) for words in options.names)]
    if not wanted:
        parser.error(f"no mutation has the words {', '.join(map(repr, options.names))}")
    selections = ["short", "all"] if options.long else ["short"]
    try:
        for mutation in wanted:
            find(ROOT, mutation)  # all texts, before the first minutes are spent
        if not options.no_control:
            control({m.name.split()[0] for m in wanted}, selections)
        noticed = [judge(mutation, selections) for mutation in wanted]
    except CannotJudge as error:
        print(f"mutations: {error}", file=sys.stderr)
        return 2
    print(f"{sum(noticed)} of {len(noticed)} mutations noticed")
    return 0 if all(noticed) else 1


def _has(name: str, words: str) -> bool:
    return set(words.lower().split()) <= set(re.findall(r"\w+", name.lower()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
