"""The comparison by model size: what is measured, what is left out, and going on after an interruption."""

import csv
import json

import pytest
import torch

from convnextv2_kernels.benchmark import allocator, figure6, machine, memory, step
from convnextv2_kernels.benchmark.baseline import Baseline
from convnextv2_kernels.benchmark.correctness import CorrectnessError
from convnextv2_kernels.benchmark.timing import Budget
from convnextv2_kernels.benchmark.variants import make_batch, make_dense, make_sparse
from convnextv2_kernels.cli.bench import main

TINY_RUN = ["--figure6", "--img-size", "64", "--batch-size", "2", "--repeats", "3", "--device", "cpu"]
QUICK = [*TINY_RUN, "--no-compile", "--no-peak"]


def run(tmp_path, *arguments, quick=True):
    code = main([*(QUICK if quick else TINY_RUN), *arguments, "--output", str(tmp_path)])
    path = tmp_path / "figure6.json"
    return code, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.thorough
def test_every_arm_is_measured_and_held_against_ours(tmp_path, capsys):
    code, result = run(tmp_path, "--models", "atto", "--no-compile", quick=False)
    assert code == 0 and result["kind"] == "figure6" and result["left_out"] == {}
    (size,) = result["sizes"]
    variants, found = size["variants"], size["ratios"]
    assert {(a["baseline"] or {}).get("layout") for a in variants.values()} == {None, "nchw", "channels_last"}
    assert [name for name in variants if name.startswith("sparse")] == [
        f"sparse {name}" for name in figure6.our_backends("cpu", torch.float32)
    ]
    # the faster pointwise layers of each layout were taken
    for layout in ("nchw", "channels_last"):
        probed = {name: ms for name, ms in size["probe_ms"].items() if f" {layout} " in name}
        assert len(probed) == 2 and min(probed, key=probed.get) in variants
    ours = variants[size["ours"]]
    assert found["throughput"] == pytest.approx(ours["images_per_s"] / variants[found["fastest_dense"]]["images_per_s"])
    assert found["saved"] == pytest.approx(variants[found["frugal_dense"]]["saved_bytes"] / ours["saved_bytes"])
    assert all(variant["peak"]["bytes"] is None or variant["peak"]["bytes"] > 0 for variant in variants.values())
    assert set(size["correctness"]) == {name for name in variants if name.startswith("sparse")}
    assert size["control"]["of"] in variants and size["control"]["ratio"] > 0
    assert result["format"] == 2 and result["allocator"]["mode"] == "constant"
    assert (tmp_path / "figure6.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "figure6.csv").open()))
    assert [row["variant"] for row in rows] == list(variants)
    assert float(rows[-1]["images_per_s"]) == pytest.approx(list(variants.values())[-1]["images_per_s"], rel=1e-3)
    assert "times the throughput of the fastest dense variant" in capsys.readouterr().out


def pretend_to_compile(monkeypatch):
    """The compiler takes a minute here; returns what it was asked for."""
    compiled = []

    def compile_(model, **options):
        if model.encoder.stages[0][0].kind == "conv1x1":

            def fails(*args):
                raise RuntimeError("no C++ compiler\nand a long trace")

            return fails
        compiled.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    return compiled


def test_the_fastest_compiled_kind_is_an_arm(tmp_path, monkeypatch):
    compiled = pretend_to_compile(monkeypatch)
    _, result = run(tmp_path, "--models", "atto", "--no-peak", quick=False)
    (size,) = result["sizes"]
    tried = {name: ms for name, ms in size["probe_ms"].items() if name.endswith(" compile")}
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 2 == [compiled[0]] * len(tried)
    assert [n for n, variant in size["variants"].items() if variant["execution"] == "compile"] == [
        min(tried, key=tried.get)
    ]
    # what cannot be compiled is named, and does not end the run
    assert list(size["skipped"].values()) == ["cannot be compiled: no C++ compiler"]


@pytest.mark.thorough
def test_more_effort_measures_a_size_again(tmp_path, monkeypatch, capsys):
    pretend_to_compile(monkeypatch)
    less = run(tmp_path, "--models", "atto")[1]["sizes"][0]
    assert set(less["skipped"].values()) == {"not asked for"}
    more = run(tmp_path, "--models", "atto", "--no-peak", quick=False)[1]["sizes"][0]
    assert any(variant["execution"] == "compile" for variant in more["variants"].values())
    capsys.readouterr()
    assert run(tmp_path, "--models", "atto")[1]["sizes"][0] == more
    assert "measured before" in capsys.readouterr().err
    again = run(tmp_path, "--models", "atto", "--repeats", "4")[1]["sizes"][0]
    assert all(len(variant["samples_ms"]) == 4 for variant in again["variants"].values())


def test_the_same_command_goes_on(tmp_path, capsys):
    assert run(tmp_path, "--models", "atto")[0] == 0
    first = (tmp_path / "figure6.json").read_text()
    code, result = run(tmp_path, "--models", "femto", "atto")
    assert code == 0 and [size["model"] for size in result["sizes"]] == ["convnextv2_atto", "convnextv2_femto"]
    assert result["sizes"][0] == json.loads(first)["sizes"][0]
    assert "convnextv2_atto: measured before" in capsys.readouterr().err


def test_a_file_of_another_run_is_not_mixed_in(tmp_path, capsys):
    run(tmp_path, "--models", "atto")
    before = (tmp_path / "figure6.json").read_bytes()
    assert run(tmp_path, "--models", "femto", "--seed", "3")[0] == 2
    assert "was measured with seed 0, this run has 3; give another --output, or --restart to" in capsys.readouterr().err
    assert (tmp_path / "figure6.json").read_bytes() == before
    code, result = run(tmp_path, "--models", "atto", "--seed", "3", "--restart")
    assert code == 0 and result["parameters"]["seed"] == 3
    (tmp_path / "figure6.json").write_text("[1, 2")
    assert run_code(tmp_path) == 2
    assert "is not valid JSON" in capsys.readouterr().err
    (tmp_path / "figure6.json").write_text(
        json.dumps({"kind": "scaling", "machine": {}, "parameters": {}, "series": []})
    )
    assert run_code(tmp_path) == 2
    assert "is a result of kind 'scaling', expected 'figure6'" in capsys.readouterr().err


def run_code(tmp_path):
    return main([*QUICK, "--models", "atto", "--output", str(tmp_path)])


def test_an_interruption_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    measure = figure6.measure_size

    def interrupted(model, *rest):
        if model == "convnextv2_femto":
            raise KeyboardInterrupt
        return measure(model, *rest)

    monkeypatch.setattr(figure6, "measure_size", interrupted)
    code, result = run(tmp_path, "--models", "atto", "femto")
    assert code == 130 and [size["model"] for size in result["sizes"]] == ["convnextv2_atto"]
    assert "the same command measures the others" in capsys.readouterr().err


def test_a_size_that_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figure6, "available_bytes", lambda device: 2 << 30)
    code, result = run(tmp_path, "--models", "atto", "huge")
    assert code == 0 and list(result["left_out"]) == ["convnextv2_huge"]
    assert "2.0 GiB are available" in result["left_out"]["convnextv2_huge"]
    assert "huge left out: needs about" in capsys.readouterr().out


def starve(monkeypatch, fails):
    """Dense variants whose variant ``fails`` says so run out of memory on more images than the gate takes."""
    make_dense = figure6.make_dense

    def starved(base, baselines, execution="eager"):
        variants = make_dense(base, baselines, execution)
        for variant in variants:
            if fails(variant.baseline):

                def run(images, mask, right=variant.model):
                    if len(images) > 2:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    return right(images, mask)

                variant.run = run
        return variants

    monkeypatch.setattr(figure6, "make_dense", starved)


@pytest.mark.thorough
def test_an_arm_without_memory_does_not_cost_the_size(tmp_path, monkeypatch, capsys):
    starve(monkeypatch, lambda variant: variant.pointwise == "plain" or variant.layout == "nchw")
    code, result = run(tmp_path, "--models", "atto", "--batch-size", "3")
    (size,) = result["sizes"]
    assert code == 0 and result["left_out"] == {}
    gone = {name for name, why in size["skipped"].items() if why == "out of memory"}
    assert gone == {"dense nchw linear eager", "dense nchw conv1x1 eager", "dense channels_last plain eager"}
    assert len(size["variants"]) == 1 + len(figure6.our_backends("cpu", torch.float32))
    assert "dense channels_last plain eager skipped: out of memory" in capsys.readouterr().out
    # it is not tried again
    assert run(tmp_path, "--models", "atto", "--batch-size", "3")[1]["sizes"] == [size]


def test_a_size_without_any_dense_arm_is_named(tmp_path, monkeypatch):
    starve(monkeypatch, lambda variant: True)
    code, result = run(tmp_path, "--models", "atto", "--batch-size", "3")
    assert code == 0 and result["left_out"] == {"convnextv2_atto": "out of memory"} and result["sizes"] == []


def test_a_spent_budget_is_named(tmp_path, monkeypatch):
    code, result = run(tmp_path, "--models", "atto", "--time-budget", "0.001")
    assert code == 0 and result["left_out"] == {"convnextv2_atto": "time budget"} and result["sizes"] == []
    settings = figure6.Figure6Settings(batch_size=1, img_size=64)
    size = figure6.measure_size("convnextv2_atto", settings, Budget(1e-9), lambda message: None, lambda share: None)
    assert len(size["variants"]["sparse reference"]["samples_ms"]) == 3
    assert set(size["skipped"].values()) == {"time budget"} and len(size["skipped"]) == 3
    assert size["variants"]["sparse reference"]["peak"] == {"bytes": None, "reason": "time budget"}


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capsys):
    run_by = figure6.run_by

    def wrong(sparse, backend):
        variant = run_by(sparse, backend)
        right = variant.run
        variant.run = lambda images, mask: right(images * 1.001, mask)
        return variant

    monkeypatch.setattr(figure6, "run_by", wrong)
    code, result = run(tmp_path, "--models", "atto")
    assert code == 1 and result is None
    assert "correctness check: atto: FCMAE step, sparse reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask-ratio", "1"], "expected a number of at least 0 and below 1, got '1'"),
        (["--models", "giant"], "expected one of convnextv2_atto"),
        (["--batch-size", "-1"], "expected a whole number above 0, got '-1'"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--figure6", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("baseline", [Baseline("nchw", "linear"), Baseline("channels_last", "conv1x1")])
def test_saved_bytes_are_foretold_exactly(baseline):
    batch = make_batch(3, 64, seed=0)
    sparse = make_sparse("convnextv2_atto", seed=0)
    (dense,) = make_dense(sparse, [baseline])
    alive = [*dense.model.parameters(), batch.images, batch.mask]
    counted = memory.saved_bytes(lambda: dense.forward(batch)[0], alive)
    parameters, kept = memory.dense_bytes("convnextv2_atto", 3, 64, baseline)
    assert kept == counted
    assert parameters == sum(p.nbytes for p in sparse.model.parameters())


def test_dense_arms_share_the_weights_of_the_sparse_one():
    sparse = make_sparse("convnextv2_atto", seed=0)
    variants = make_dense(sparse, [Baseline("nchw", "linear"), Baseline("channels_last", "conv1x1")])
    linear = "encoder.stages.0.0.pwconv1.weight"
    pointers = {dict(variant.model.named_parameters())[linear].data_ptr() for variant in (sparse, *variants)}
    assert len(pointers) == 1
    gradients = {id(p) for variant in (sparse, *variants) for p in variant.model.parameters()}
    assert len(gradients) == 3 * len(list(sparse.model.parameters()))


def test_available_memory_heeds_the_control_group(tmp_path):
    (tmp_path / "proc").mkdir()
    assert machine.available_bytes("cpu", tmp_path) is None
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert machine.available_bytes("cpu", tmp_path) == 8000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("5000\n")
    (group / "memory.current").write_text("4000\n")
    (group / "memory.stat").write_text("inactive_file 300\nother 1\n")
    assert machine.available_bytes("cpu", tmp_path) == 1300
    (group / "memory.max").write_text("max\n")
    assert machine.available_bytes("cpu", tmp_path) == 8000 * 1024


def test_the_check_computes_the_truth_once_for_all_arms():
    batch = make_batch(2, 64, seed=0)
    sparse = make_sparse("convnextv2_atto", seed=0)
    dense = make_dense(sparse, [Baseline("nchw", "linear")])
    wrong = figure6.run_by(sparse, "reference")
    wrong.run = lambda images, mask: sparse.run(images + 1e-3, mask)
    with pytest.raises(CorrectnessError, match="FCMAE step, sparse reference"):
        figure6.check_variants([sparse, wrong], dense, batch)


def test_a_control_that_is_off_marks_the_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step.Control, "from_samples", classmethod(lambda cls, of, a, b: cls(of, 1.5)))
    _, result = run(tmp_path, "--models", "atto")
    (size,) = result["sizes"]
    assert size["control"]["valid"] is False and size["control"]["ratio"] == 1.5
    assert "INVALID: a copy of dense" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "figure6.csv").open()))
    assert {row["valid"] for row in rows} == {"False"} and {row["control_ratio"] for row in rows} == {"1.5"}


def test_each_allocator_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "hold", lambda mode: {"mode": mode})
    assert run(tmp_path, "--models", "atto", "--allocator", "both")[0] == 0
    modes = {path.stem: json.loads(path.read_text())["allocator"]["mode"] for path in tmp_path.glob("*.json")}
    assert modes == {"figure6": "constant", "figure6_default_allocator": "default"}
