"""Build, test and measure on a GPU, in one command and within a time limit.

    python -m bench gpu --out DIR                        # everything, at most 9 minutes
    python -m bench gpu --out DIR --only build,kernels   # some stages; those of earlier runs stay in the file
    python -m bench gpu --out DIR --dry-run              # the same program on a CPU, to test it

Results go to DIR/results.json as soon as they are known. The dry run needs the emulated kernels
(``python setup.py build_emulation``, CONVNEXTV2_KERNELS_CUDA_EMULATION), for the Triton stages TRITON_INTERPRET=1; its
times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .machine import source_digest
from .report import errors_of, print_report
from .results import Results, run_here
from .runner import Stage, run_stages
from .setting import Setting

# In order of value: what is cut off by a short time limit matters less. "machine" is always run.
STAGES = (
    Stage("machine", "bench.gpu.machine", 1, 30),
    Stage("build", "bench.gpu.build", 10, 400, "(compiles the kernels)"),
    Stage("smoke", "bench.gpu.smoke", 10, 60, "(every op against float64)"),
    Stage("triton_smoke", "bench.gpu.triton_smoke", 15, 60, "(the same by the Triton backend)"),
    Stage("ceilings", "bench.gpu.ceilings", 8, 40, "(copy bandwidth, matrix products, launches)"),
    Stage("tests", "bench.gpu.suite", 25, 120, "(conformance suite)"),
    Stage("kernels", "bench.gpu.kernels", 15, 100, "(each operator alone)"),
    Stage("triton_kernels", "bench.gpu.triton_kernels", 20, 100, "(Triton's kernels and fused products)"),
    Stage("step", "bench.gpu.step", 25, 185, "(FCMAE training step)"),
    Stage("profile", "bench.gpu.profiling", 15, 30, "(where a step's time goes)"),
    Stage("sanitizer", "bench.gpu.sanitizer", 30, 75, "(compute-sanitizer)"),
    Stage("triton_tune", "bench.gpu.triton_tune", 40, 120, "(plans of Triton's fused products)"),
    Stage("compile", "bench.gpu.compiled", 60, 600, "(against torch.compile)"),
    Stage("plot", "bench.gpu.plot", 2, 30),
)
NAMES = [stage.name for stage in STAGES]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for results.json, logs and the picture")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit (default: %(default)s)")
    parser.add_argument("--only", default=",".join(NAMES), help=f"stages, of {','.join(NAMES)}")
    parser.add_argument("--dry-run", action="store_true", help="emulated kernels on a CPU; the times mean nothing")
    for name in ("--child", "--stage", "--setting"):  # how the program starts itself for one stage
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="cuda", help=argparse.SUPPRESS)  # stand-in, for work on this program
    options = parser.parse_args(arguments)
    if options.child is None:
        check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a message where the options make no sense."""
    unknown = set(options.only.split(",")) - set(NAMES)
    if unknown:
        parser.error(f"--only must name stages of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    if options.out is None:
        parser.error("--out is needed")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    emulated = bool(os.environ.get("CONVNEXTV2_KERNELS_CUDA_EMULATION"))
    if not options.dry_run and emulated:
        parser.error("CONVNEXTV2_KERNELS_CUDA_EMULATION is set: without --dry-run the kernels must be those of a GPU")
    if options.dry_run and options.backend == "cuda" and not emulated:
        parser.error(
            "--dry-run needs CONVNEXTV2_KERNELS_CUDA_EMULATION, a library of `python setup.py build_emulation`"
        )


def open_results(setting: Setting) -> None:
    """A results.json for this run; stages of an earlier run are kept if the sources are the same."""
    setting.folder.mkdir(parents=True, exist_ok=True)
    results, digest = Results(setting.folder), source_digest()
    same = results.data.get("source_sha256") == digest and results.data.get("dry_run") == setting.dry_run
    header = {
        "format": 2,
        "kind": "gpu_check",
        "dry_run": setting.dry_run,
        "note": "a dry run on a CPU: its times mean nothing" if setting.dry_run else "see bench/README.md",
        "source_sha256": digest,
    }
    results.data = {**header, "stages": results.data["stages"] if same else {}}
    results.save()


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.child is not None:
        module = importlib.import_module(options.child)
        code = run_here(options.stage, module.run, Setting.from_json(options.setting))
        sys.stdout.flush()
        os._exit(code)  # no destructors: one that waits for a broken GPU would hang
    deadline = time.time() + 60 * options.minutes
    setting = Setting(str(options.out.resolve()), deadline, options.dry_run, options.backend)
    open_results(setting)
    wanted = {"machine", *options.only.split(",")}
    results = run_stages([stage for stage in STAGES if stage.name in wanted], setting)
    results.save(indent=1)
    print_report(results.data)
    failed = any(stage["status"] == "failed" for stage in results.data["stages"].values())
    return 1 if failed or errors_of(results.data) else 0
