"""The comparison by model size: what is measured, what is left out, and going on after an interruption."""

import csv
import json

import pytest
import torch

from convnextv2_kernels.benchmark import device, figure6, figure6_cli, fits, memory
from convnextv2_kernels.benchmark.arms import make_batch, make_dense, make_sparse
from convnextv2_kernels.benchmark.cli import main
from convnextv2_kernels.benchmark.gate import GateError
from convnextv2_kernels.benchmark.masked_dense import Variant
from convnextv2_kernels.benchmark.options import Budget

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
    arms, found = size["arms"], size["ratios"]
    assert {(a["variant"] or {}).get("layout") for a in arms.values()} == {None, "nchw", "channels_last"}
    assert [name for name in arms if name.startswith("sparse")] == [
        f"sparse {name}" for name in figure6.our_backends("cpu", torch.float32)
    ]
    # the faster pointwise layers of each layout were taken
    for layout in ("nchw", "channels_last"):
        probed = {name: ms for name, ms in size["probe_ms"].items() if f" {layout} " in name}
        assert len(probed) == 2 and min(probed, key=probed.get) in arms
    ours = arms[size["ours"]]
    assert found["throughput"] == pytest.approx(ours["images_per_s"] / arms[found["fastest_dense"]]["images_per_s"])
    assert found["saved"] == pytest.approx(arms[found["frugal_dense"]]["saved_bytes"] / ours["saved_bytes"])
    assert all(arm["peak"]["bytes"] is None or arm["peak"]["bytes"] > 0 for arm in arms.values())
    assert set(size["gate"]) == {name for name in arms if name.startswith("sparse")}
    assert (tmp_path / "figure6.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "figure6.csv").open()))
    assert [row["arm"] for row in rows] == list(arms)
    assert float(rows[-1]["images_per_s"]) == pytest.approx(list(arms.values())[-1]["images_per_s"], rel=1e-3)
    assert "times the throughput of the fastest dense arm" in capsys.readouterr().out


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
    assert [n for n, arm in size["arms"].items() if arm["variant"] and arm["variant"]["compiled"]] == [
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
    assert any(arm["variant"] and arm["variant"]["compiled"] for arm in more["arms"].values())
    capsys.readouterr()
    assert run(tmp_path, "--models", "atto")[1]["sizes"][0] == more
    assert "measured before" in capsys.readouterr().err
    again = run(tmp_path, "--models", "atto", "--repeats", "4")[1]["sizes"][0]
    assert all(len(arm["samples_ms"]) == 4 for arm in again["arms"].values())


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
    assert "is no result of this benchmark" in capsys.readouterr().err
    (tmp_path / "figure6.json").write_text(json.dumps({"kind": "scaling"}))
    assert run_code(tmp_path) == 2
    assert "is a result of kind 'scaling', expected 'figure6'" in capsys.readouterr().err


def run_code(tmp_path):
    return main([*QUICK, "--models", "atto", "--output", str(tmp_path)])


def test_an_interruption_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    measure = figure6_cli.measure_size

    def interrupted(model, *rest):
        if model == "convnextv2_femto":
            raise KeyboardInterrupt
        return measure(model, *rest)

    monkeypatch.setattr(figure6_cli, "measure_size", interrupted)
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
    """Dense arms whose variant ``fails`` says so run out of memory on more images than the gate takes."""
    make_dense = figure6.make_dense

    def starved(base, variants):
        arms = make_dense(base, variants)
        for arm in arms:
            if fails(arm.variant):

                def run(images, mask, right=arm.run):
                    if len(images) > 2:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    return right(images, mask)

                arm.run = run
        return arms

    monkeypatch.setattr(figure6, "make_dense", starved)


def test_an_arm_without_memory_does_not_cost_the_size(tmp_path, monkeypatch, capsys):
    starve(monkeypatch, lambda variant: variant.pointwise == "plain" or variant.layout == "nchw")
    code, result = run(tmp_path, "--models", "atto", "--batch-size", "3")
    (size,) = result["sizes"]
    assert code == 0 and result["left_out"] == {}
    gone = {name for name, why in size["skipped"].items() if why == "out of memory"}
    assert gone == {"dense nchw linear eager", "dense nchw conv1x1 eager", "dense channels_last plain eager"}
    assert len(size["arms"]) == 1 + len(figure6.our_backends("cpu", torch.float32))
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
    settings = figure6.Settings(batch_size=1, img_size=64)
    size = figure6.measure_size("convnextv2_atto", settings, Budget(1e-9), lambda message: None, lambda share: None)
    assert len(size["arms"]["sparse reference"]["samples_ms"]) == 3
    assert set(size["skipped"].values()) == {"time budget"} and len(size["skipped"]) == 3
    assert size["arms"]["sparse reference"]["peak"] == {"bytes": None, "reason": "time budget"}


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capsys):
    served_by = figure6.served_by

    def wrong(sparse, backend):
        arm = served_by(sparse, backend)
        right = arm.run
        arm.run = lambda images, mask: right(images * 1.001, mask)
        return arm

    monkeypatch.setattr(figure6, "served_by", wrong)
    code, result = run(tmp_path, "--models", "atto")
    assert code == 1 and result is None
    assert "correctness gate: atto: FCMAE step, sparse reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask-ratio", "1"], "'1' is not a number from 0 to below 1"),
        (["--models", "giant"], "'giant' is not one of convnextv2_atto"),
        (["--batch-size", "-1"], "'-1' is not a whole number of at least 1"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--figure6", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_modes_exclude_each_other(capsys):
    assert main(["--figure6", "--scaling"]) == 2
    assert "--figure6 and --scaling exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("variant", [Variant("nchw", "linear"), Variant("channels_last", "conv1x1")])
def test_saved_bytes_are_foretold_exactly(variant):
    batch = make_batch(3, 64, seed=0)
    sparse = make_sparse("convnextv2_atto", seed=0)
    (dense,) = make_dense(sparse, [variant])
    alive = [*dense.model.parameters(), batch.images, batch.mask]
    counted = memory.saved_bytes(lambda: dense.forward(batch)[0], alive)
    parameters, kept = fits.dense_bytes("convnextv2_atto", 3, 64, variant)
    assert kept == counted
    assert parameters == sum(p.nbytes for p in sparse.model.parameters())


def test_dense_arms_share_the_weights_of_the_sparse_one():
    sparse = make_sparse("convnextv2_atto", seed=0)
    arms = make_dense(sparse, [Variant("nchw", "linear"), Variant("channels_last", "conv1x1")])
    linear = "encoder.stages.0.0.pwconv1.weight"
    pointers = {dict(arm.model.named_parameters())[linear].data_ptr() for arm in (sparse, *arms)}
    assert len(pointers) == 1
    gradients = {id(p) for arm in (sparse, *arms) for p in arm.model.parameters()}
    assert len(gradients) == 3 * len(list(sparse.model.parameters()))


def test_available_memory_heeds_the_control_group(tmp_path):
    (tmp_path / "proc").mkdir()
    assert device.available_bytes("cpu", tmp_path) is None
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert device.available_bytes("cpu", tmp_path) == 8000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("5000\n")
    (group / "memory.current").write_text("4000\n")
    (group / "memory.stat").write_text("inactive_file 300\nother 1\n")
    assert device.available_bytes("cpu", tmp_path) == 1300
    (group / "memory.max").write_text("max\n")
    assert device.available_bytes("cpu", tmp_path) == 8000 * 1024


def test_gate_computes_the_truth_once_for_all_arms():
    batch = make_batch(2, 64, seed=0)
    sparse = make_sparse("convnextv2_atto", seed=0)
    dense = make_dense(sparse, [Variant("nchw", "linear")])
    wrong = figure6.served_by(sparse, "reference")
    wrong.run = lambda images, mask: sparse.run(images + 1e-3, mask)
    with pytest.raises(GateError, match="FCMAE step, sparse reference"):
        figure6.check_arms([sparse, wrong], dense, batch)
