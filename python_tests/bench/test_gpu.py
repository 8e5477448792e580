"""bench gpu: what can be tested of it without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnextv2_kernels.backends import triton
from convnextv2_kernels.backends.triton import availability
from convnextv2_kernels.benchmark.variants import run_by

ROOT = Path(__file__).resolve().parents[2]
EMULATION = os.environ.get("CONVNEXTV2_KERNELS_CUDA_EMULATION")
TRITON_STAGES = ("triton_smoke", "triton_kernels", "triton_tune")
needs_triton = pytest.mark.skipif(triton.load_error() is not None, reason=str(triton.load_error()))


@pytest.fixture
def gpu():
    """Imports a module of bench/gpu."""
    return lambda name: importlib.import_module(f"bench.gpu.{name}")


@pytest.fixture
def run_stages(gpu, monkeypatch, tmp_path):
    """Runs stages given as ``name=source of their module`` for some seconds; returns the stages of results.json."""
    runner, setting = gpu("runner"), gpu("setting")
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(seconds: float = 60, needs: float = 0, most: float = 60, **sources: str) -> dict:
        stages = []
        for name, source in sources.items():
            (tmp_path / f"stage_{name}.py").write_text(source)
            stages.append(runner.Stage(name, f"stage_{name}", needs, most))
        deadline = time.time() + seconds
        runner.run_stages(stages, setting.Setting(str(tmp_path), deadline, True), reserve=0)
        return json.loads((tmp_path / "results.json").read_text())["stages"]

    return run


GOOD = "def run(setting, recorder):\n    recorder.put(value=1.23456789)\n"


def test_a_stage_that_raises_is_recorded_and_the_rest_goes_on(run_stages):
    bad = "def run(setting, recorder):\n    recorder.put(before=1)\n    raise ValueError('no such thing')\n"
    stages = run_stages(bad=bad, good=GOOD)
    assert stages["bad"]["status"] == "failed" and stages["bad"]["reason"] == "ValueError: no such thing"
    assert "in run" in stages["bad"]["traceback"] and stages["bad"]["result"] == {"before": 1}
    assert stages["good"]["status"] == "done" and stages["good"]["result"] == {"value": 1.235}


@pytest.mark.thorough
def test_cases_survive_errors_crashes_and_hangs_of_others(run_stages):
    source = """
import os, time
def boom():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def run(setting, recorder):
    recorder.case("numbers", "one", lambda: 1)
    recorder.case("numbers", "wrong", lambda: 1 / 0)
    recorder.case("numbers", "lost", boom)
    recorder.case("numbers", "crash", lambda: os.abort())
    recorder.case("numbers", "hang", lambda: time.sleep(100), limit=1)
    recorder.case("numbers", "late", lambda: 3, needs=1000)
    recorder.case("numbers", "two", lambda: 2)
"""
    stage = run_stages(cases=source)["cases"]
    assert stage["result"]["numbers"] == {"one": 1, "two": 2}
    errors = stage["result"]["errors"]
    assert errors["wrong"].startswith("ZeroDivisionError: division by zero [") and "CUDA error" in errors["lost"]
    assert "code -6" in errors["crash"] and "crash, or a hang" in errors["hang"]
    assert "1000 s needed" in stage["result"]["skipped"]["late"]
    assert stage["status"] == "done" and stage["restarts"] == 3


def test_the_time_limit_holds(run_stages):
    start = time.monotonic()
    stages = run_stages(
        6,
        slow="import time\ndef run(setting, recorder):\n    recorder.put(half=1)\n    time.sleep(100)\n",
        good=GOOD,
        needs=1,
    )
    assert time.monotonic() - start < 20
    assert stages["slow"]["status"] == "failed" and "time was up" in stages["slow"]["reason"]
    assert stages["slow"]["result"] == {"half": 1}
    assert stages["good"]["status"] == "skipped" and "1 s needed" in stages["good"]["reason"]


def test_a_stage_may_skip_itself(run_stages):
    source = "from bench.gpu.setting import Skip\ndef run(setting, recorder):\n    raise Skip('no such tool')\n"
    stage = run_stages(absent=source)["absent"]
    assert stage["status"] == "skipped" and stage["reason"] == "no such tool"


class Counting:
    """A namespace of operators that adds up the bytes of all tensors the last call was given or returned."""

    def __init__(self, ops):
        self.ops, self.total = ops, 0

    def __getattr__(self, name):
        operator = getattr(self.ops, name).default

        def call(*args):
            out = operator(*args)
            tensors = [*args, *(out if isinstance(out, (tuple, list)) else [out])]
            self.total = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            return out

        return type("Packet", (), {"default": staticmethod(call)})


def test_counted_bytes_are_those_of_the_tensors(gpu):
    """Never more than all tensors of a call have, and not much less: what is left out is small."""
    from convnextv2_kernels.backends import native

    if native.load_error is not None:
        pytest.skip(native.load_error)
    cases, conv, rows, operators = (gpu(name) for name in ("cases", "conv_cases", "row_cases", "operators"))
    counting = Counting(torch.ops.convnextv2_kernels)
    draw = operators.Draw("meta", torch.bfloat16)
    families = (conv.packed_cases, conv.dense_cases, rows.norm_cases, rows.mlp_cases, rows.copy_cases)
    checked = set()
    for shape in cases.stage_shapes("tiny", 256)[:2]:
        for case in (case for family in families for case in family(counting, shape, 2)):
            operator = case.key.split()[0]
            # these read or write only a part of a tensor
            if case.peer or operator in (
                "gather",
                "put",
                "gather_normalize",
                "normalized_backward_put",
                "patch_pixels",
            ):
                continue
            try:
                case.make(draw, 1)[0]()
            except (AttributeError, NotImplementedError) as error:
                pytest.skip(f"the extension is older than the sources: {error}")
            assert case.bytes <= counting.total, case.key
            least = 0.4 if operator == "neighbour_slots" else 0.95
            assert case.bytes >= least * counting.total, case.key
            checked.add(operator)
    assert len(checked) >= 19


def test_bytes_of_what_reads_a_part_of_a_tensor(gpu):
    moved = gpu("bytes_moved")
    assert moved.gather(10, 3, 2) == 2 * 10 * 3 * 2
    assert moved.gather_normalize(10, 3, 2) == 2 * 10 * 3 * 2 + 10 * 4
    assert moved.scatter(10, 25, 3, 2) == (10 + 25) * 3 * 2
    assert moved.patch_pixels(10, 3, 4) == 2 * 10 * 48 * 4


def test_shares_and_targets(gpu):
    kernels, cases = gpu("kernels"), gpu("cases")
    big = cases.Case("big", 400_000_000, None, target=0.5)
    row = kernels.judge(big, cold=160e-6, warm=100e-6, copy_tbps=4.0)
    assert row["cold_us"] == pytest.approx(160) and row["copy_share_cold"] == pytest.approx(0.625)
    assert row["copy_share_warm"] == pytest.approx(1.0) and row["met"]
    assert not kernels.judge(big, cold=210e-6, warm=1e-4, copy_tbps=4.0)["met"]
    small = cases.Case("small", 4_000_000, None, target=0.5)
    assert "met" not in kernels.judge(small, cold=1e-3, warm=1e-3, copy_tbps=4.0)


def test_numbers_of_buffers(gpu):
    timing = gpu("timing")
    assert timing.cold_sets(300 << 20) == 2 and timing.cold_sets(20 << 20) == 10 and timing.cold_sets(1) == 256
    assert timing.warm_calls(1.0) == 4 and timing.warm_calls(1e-4) == 20 and timing.warm_calls(0.0) == 256


def test_busy_share_counts_overlaps_once(gpu):
    profiling = gpu("profiling")
    assert profiling.busy_share([(0, 2), (1, 3), (6, 10)]) == pytest.approx(0.7)
    assert profiling.kind("void cnx::cuda::conv_small_patch<float>") == "own kernels"
    assert profiling.kind("nvjet_tst_128x256_64x4") == "matrix products"


def test_junit_report(gpu, tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="python_tests.cuda.test_a" name="ok"/>'
        '<testcase classname="python_tests.cuda.test_a" name="bad"><failure message="assert 1 == 2&#10;more"/>'
        "</testcase>"
        '<testcase classname="m" name="no"><skipped message="why"/></testcase></testsuite></testsuites>'
    )
    found = gpu("suite").parse(report)
    assert found["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert found["failing"] == {"cuda.test_a::bad": "assert 1 == 2"}


def test_sanitizer_reports(gpu):
    parse = gpu("sanitizer").parse
    text = "========= Invalid __global__ read of size 4 bytes\n=========     at k\n========= ERROR SUMMARY: 3 errors\n"
    assert parse(text) == {"errors": 3, "first": ["Invalid __global__ read of size 4 bytes"]}
    assert parse("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")["errors"] == 0
    assert parse("killed")["errors"] is None


def test_the_suite_s_parts_add_up(gpu, monkeypatch, tmp_path):
    suite, setting, results = gpu("suite"), gpu("setting"), gpu("results")
    line, _ = suite.command(tmp_path / "junit.xml", False, "triton")
    assert line[line.index("-k") + 1] == "triton" and "python_tests/backends/triton" in line
    assert "--ignore=python_tests/backends/triton/test_resources.py" in line
    found = {
        "cuda": {"counts": {"passed": 5, "failed": 0, "error": 0, "skipped": 2}, "failing": {}},
        "triton": {"counts": {"passed": 3, "failed": 1, "error": 0, "skipped": 0}, "failing": {"t": "no"}},
    }
    limits = {}
    monkeypatch.setattr(suite, "run_part", lambda part, limit, *_: limits.update({part: limit}) or found[part])
    monkeypatch.setattr(suite, "why_not", lambda part, _: None)
    here = setting.Setting(str(tmp_path), time.time() + 100)
    recorder = results.Recorder(results.Results(tmp_path), "tests", here)
    with pytest.raises(RuntimeError, match="1 tests failed, 0 could not"):
        suite.run(here, recorder)
    assert recorder.result["counts"] == {"passed": 8, "failed": 1, "error": 0, "skipped": 2}
    assert recorder.result["failing"] == {"t": "no"}
    assert limits == {"cuda": pytest.approx(55, abs=2), "triton": pytest.approx(85, abs=2)}


@pytest.fixture(params=[(24, 256, 3, 64), (40, 76, 4, 64), (40, 76, 1, 32)], ids=str)
def products(request, gpu):
    """The module, a case of its kernels, and a tile: whole tiles of an image, tiles over borders, one short tile."""
    if triton.load_error() is not None:
        pytest.skip(triton.load_error())
    from convnextv2_kernels.backends.triton import plans, tune

    width, each, images, rows = request.param
    case = tune.Case(plans.Shape(torch.float16, width, 4 * width, width, each), images, "cpu")
    return gpu("triton_products"), case, plans.Tile(rows, 32, 32, 4, 2)


@pytest.mark.parametrize("name", ("first", "second", "products", "hidden", "weight"))
def test_bytes_and_operations_of_fused_products(products, name):
    """Bytes: exactly those of what a kernel is given and returns; operations: those of the vendor's products."""
    from convnextv2_kernels.backends.triton import plans
    from convnextv2_kernels.backends.triton.launch import recorded_launches

    module, case, tile = products
    with recorded_launches() as launches, plans.assumed_family("sm_90"):
        case.kernel(name, tile)()
    first, *later = [{k: t for k, t in one.arguments.items() if isinstance(t, torch.Tensor)} for one in launches]
    seen = {id(t) for t in first.values()}
    rest = {id(t): t for one in later for t in one.values() if id(t) not in seen}
    size = module.size_of(case, name, tile)
    assert module.LEAST_BYTES[name](size) == sum(t.nbytes for t in (*first.values(), *rest.values()))
    with FlopCounterMode(display=False) as counter:
        module.vendor(case, name)()
    assert module.flops(name, size) == counter.get_total_flops()


@needs_triton
def test_tiles_to_measure(gpu, monkeypatch):
    from convnextv2_kernels.backends.triton import plans

    products, cases, kernels = gpu("triton_products"), gpu("cases"), gpu("triton_kernels")
    monkeypatch.setattr(plans, "family", lambda index=None: "sm_90")
    rows = [{"bits": [16], "width": [1, 64], "rows_each": 256, "source": "here", "first": [1] * 5, "second": [2] * 5}]
    rows += [{"bits": [16], "rows_each": 999999, "source": "other", "first": [8] * 5, "hidden": [4] * 5}]
    monkeypatch.setattr(plans, "table", lambda: {"sm_90": rows})
    shapes = [kernels.shape_of(stage, torch.bfloat16) for stage in cases.stage_shapes("atto", 4)]
    assert [shape.rows_each for shape in shapes] == [1216, 304, 76, 19]
    near, far = products.Tiles.of(shapes[0]), products.Tiles.of(shapes[3])
    assert near.all["first"] == (1,) * 5 and near.planned("first") and near.plan.source == "here"
    assert near.all["hidden"] == (4,) * 5 and not near.planned("hidden")
    assert far.all["first"] == (8,) * 5 and not far.planned("first") and far.all["weight"] is not None
    assert [products.taken("forward", tiles.plan) for tiles in (near, far)] == ["fused", "library"]
    assert products.taken("backward", near.plan) == "library"


def test_lines_of_fused_products(gpu):
    rows = {
        "first tiny n256 s8 c96": {"us": 12.3, "vendor_us": 10.0, "planned": True},
        "backward tiny n256 s8 c96": {"library_us": 40.0, "fused_us": 50.0, "plan": "fused", "plan_is_fastest": False},
        "backward tiny n256 s1 c768": {"library_us": 40.0, "plan": "library", "plan_is_fastest": True},
    }
    lines = gpu("report").product_lines({"stages": {"triton_kernels": {"result": {"products": rows}}}})
    assert "s8 c96 12*/10" in lines[1] and "s8 c96 50*!/40  s1 c768 -/40" in lines[2]


def test_ours_by_other_backends(gpu, tmp_path):
    step, setting = gpu("step"), gpu("setting")
    here = setting.Setting(str(tmp_path), time.time() + 60, True, "reference")
    contest = step.Contest.make("atto", 1, here)
    other = run_by(contest.base, "auto")
    assert contest.ours.backend == "reference" and other.model is contest.ours.model
    found = step.against_backends(contest, [other], here)
    rows = found["variants"]
    assert list(rows) == ["sparse reference", "sparse auto"] and all(row["median_ms"] > 0 for row in rows.values())
    assert found["control"]["of"] in rows and "samples_ms" not in rows["sparse auto"]
    assert rows["sparse reference"]["run_by"] == "reference"
    assert rows["sparse auto"]["run_by"] == step.running("auto", "cpu") != "auto"


@needs_triton
def test_triton_stages_are_skipped_where_nothing_runs_them(gpu, monkeypatch, tmp_path):
    setting = gpu("setting")
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(setting.Skip, match="needs TRITON_INTERPRET=1"):
        gpu("triton_setup").require(setting.Setting(str(tmp_path), time.time() + 9, True))
    monkeypatch.setattr(availability, "_load_error", "triton is not installed")
    with pytest.raises(setting.Skip, match="triton cannot run: triton is not installed"):
        gpu("triton_setup").require(setting.Setting(str(tmp_path), time.time() + 9))


def check(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", "gpu", *arguments]
    environment = {**os.environ, **more}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)


@pytest.mark.thorough
@needs_triton
def test_dry_run_of_the_triton_stages(tmp_path):
    more = {"TRITON_INTERPRET": "1", "CONVNEXTV2_KERNELS_CACHE": str(tmp_path / "cache")}
    arguments = ("--dry-run", "--backend", "cpu", "--only", ",".join(TRITON_STAGES), "--minutes", "3")
    done = check("--out", str(tmp_path), *arguments, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    text = (tmp_path / "results.json").read_text()
    stages = json.loads(text)["stages"]
    assert list(stages) == ["machine", *TRITON_STAGES] and str(tmp_path) not in text
    for name, stage in stages.items():
        assert stage["status"] == "done" and "errors" not in stage["result"], (name, stage)
    smoke, kernels, tune = (stages[name]["result"] for name in TRITON_STAGES)
    assert all(answer.startswith("ok") for answer in smoke["checks"].values())
    for op in ("pointwise_mlp", "gathered_pointwise_mlp", "convnextv2_block"):
        key = f"{op} uniform 4 c8 float16"
        assert smoke["checks"][key] == "ok, forward fused, backward fused (plan: for tests)"
        assert "cuda+triton cannot run" in smoke["skipped"][f"{key} by cuda+triton"]
    assert all(row["cold_us"] > 0 and row["MB"] > 0 for row in kernels["kernels"].values())
    operators = {name.split()[0] for name in kernels["kernels"]}
    assert len(operators) >= 23 and not operators & {"torch", "layout_from_kept", "neighbour_slots"}
    products = {name.split()[0]: row for name, row in kernels["products"].items()}
    assert [name for name, row in products.items() if row.get("planned")] == ["first", "second", "products", "hidden"]
    assert products["weight"]["us"] > 0 and products["weight"]["vendor_us"] > 0
    for way in ("forward", "backward"):
        assert products[way]["plan"] == "fused" and products[way]["fused_us"] > 0 and products[way]["library_us"] > 0
    (found,) = tune["shapes"].values()
    assert set(found["committed"]) == {"first", "second", "products", "hidden"} and found["forward_us"]["fused"] > 0
    assert not (tmp_path / "cache").exists()
    assert "with fused products" in done.stdout and "fused products, dry n1" in done.stdout


def test_bad_arguments_are_refused(tmp_path):
    assert "must name stages" in check("--out", str(tmp_path), "--only", "nonsense").stderr
    assert "must be positive" in check("--out", str(tmp_path), "--minutes", "0").stderr
    assert "--out is needed" in check().stderr


@pytest.mark.skipif(not EMULATION, reason="CONVNEXTV2_KERNELS_CUDA_EMULATION is not set")
def test_dry_run(gpu, tmp_path):
    done = check("--out", str(tmp_path), "--dry-run", "--minutes", "2.5")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    text = (tmp_path / "results.json").read_text()
    data = json.loads(text)
    assert data["dry_run"] is True and "mean nothing" in data["note"] and len(text) < 200_000
    stages = data["stages"]
    assert list(stages) == [
        "machine",
        "build",
        "smoke",
        "triton_smoke",
        "ceilings",
        "tests",
        "kernels",
        "triton_kernels",
        "step",
        "profile",
        "sanitizer",
        "triton_tune",
        "compile",
        "plot",
    ]
    skipped = {"compile"} if triton.INTERPRETED else {"compile", *TRITON_STAGES}
    for name, stage in stages.items():
        assert stage["status"] == ("skipped" if name in skipped else "done"), (name, stage)
        assert "errors" not in stage["result"], (name, stage["result"]["errors"])
    result = {name: stage["result"] for name, stage in stages.items()}
    assert set(result["smoke"]["checks"].values()) == {"ok"}
    assert result["tests"]["counts"]["passed"] > 0 and not result["tests"]["failing"]
    assert all(row["cold_us"] > 0 and row["MB"] > 0 for row in result["kernels"]["kernels"].values())
    (step,) = result["step"]["eager"].values()
    assert len(step["variants"]) == 10 and step["ratios"]["throughput"] > 0 and step["control"]["ratio"] > 0
    assert result["step"]["skipped"] == {"atto n1 graph": "no GPU: CUDA graphs"}
    assert list(result["profile"]["steps"]) == ["atto n1 ours eager"]
    assert "calls: " in (tmp_path / "memcheck.log").read_text()
    assert (tmp_path / "gpu_check.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "profile_atto_1.txt").stat().st_size
    assert "DRY RUN: TIMES MEAN NOTHING" in done.stdout and len(done.stdout) < 12_000
    assert str(tmp_path) not in text
