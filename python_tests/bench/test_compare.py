"""bench compare on made-up results."""

import copy
import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.quantities import flatten
from convnextv2_kernels.benchmark import results

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
MACHINE = {"cpu": "a cpu", "threads": 2, "torch": "2.13.0", "environment": {}}


def times(median, spread=1.0):
    return {"median_ms": median, "q1_ms": median - spread, "q3_ms": median + spread, "samples_ms": [median] * 3}


def step_result():
    arms = {
        "sparse": {**times(100.0), "min_ms": 98.0, "saved_bytes": 1000, "peak": {"bytes": 5000}},
        "dense nchw": {**times(300.0), "saved_bytes": 9000, "peak": None},
    }
    rows = [
        {
            "op": "block",
            "width": 40,
            "side": s,
            "work": {"sparse": {"bytes": 7}},
            "variants": {"sparse": times(2.0, 0.1)},
        }
        for s in (8, 4)
    ]
    return {
        "format": 2,
        "kind": "step",
        "allocator": {"mode": "constant"},
        "machine": dict(MACHINE),
        "parameters": {"batch_size": 8, "repeats": 10, "models": ["atto"]},
        "step": [{"model": "atto", "variants": arms, "time_ratio": 3.0}],
        "ops": {"atto": {"rows": rows}},
    }


@pytest.fixture
def run(tmp_path, capsys):
    """Compares two results; returns (exit code, output, the JSON written)."""

    def run(a, b, *options):
        paths = [tmp_path / "A.json", tmp_path / "B.json"]
        for path, result in zip(paths, (a, b), strict=True):
            path.write_text(json.dumps(result))
        report = tmp_path / "comparison.json"
        code = main(["compare", *map(str, paths), "--json", str(report), *options])
        return code, capsys.readouterr().out, json.loads(report.read_text())

    return run


def keys(rows):
    return [row["key"] for row in rows]


def test_keys_name_things_and_not_places():
    found = flatten(step_result())
    assert set(found) == {
        "step / atto / sparse / median_ms",
        "step / atto / sparse / saved_bytes",
        "step / atto / sparse / peak / bytes",
        "step / atto / dense nchw / median_ms",
        "step / atto / dense nchw / saved_bytes",
        "ops / atto / block C=40 s=8 / sparse / median_ms",
        "ops / atto / block C=40 s=4 / sparse / median_ms",
    }
    median = found["step / atto / sparse / median_ms"]
    assert (median.value, median.low, median.high, median.unit, median.noisy) == (100.0, 99.0, 101.0, "ms", True)
    assert not found["step / atto / sparse / saved_bytes"].noisy
    assert found["step / atto / sparse / peak / bytes"].noisy


def test_other_kinds():
    arm = {**times(200.0, 10.0), "images_per_s": 320.0, "saved_bytes": 7, "peak": {"bytes": None, "reason": "none"}}
    figure = {"kind": "figure6", "machine": MACHINE, "sizes": [{"model": "tiny", "variants": {"sparse cpu": arm}}]}
    found = flatten(figure)
    assert set(found) == {f"tiny / sparse cpu / {name}" for name in ("median_ms", "images_per_s", "saved_bytes")}
    rate = found["tiny / sparse cpu / images_per_s"]
    assert rate.low == pytest.approx(320 * 200 / 210) and rate.high == pytest.approx(320 * 200 / 190)
    assert rate.more_is_better
    one = {"sparse_median_ms": 10.0, "sparse_q1_ms": 9.0, "sparse_q3_ms": 11.0}
    two = {key: 2 * value for key, value in one.items()}
    points = [{"batch": n, "img_size": 224, "ideal": one, **arm} for n, arm in ((1, one), (2, two))]
    scaling = {"kind": "scaling", "machine": MACHINE, "series": [{"axis": "batch", "points": points}]}
    found = flatten(scaling)
    assert [key.split(" / ")[-2:] for key in found] == [[f"batch={n}", "sparse_median_ms"] for n in (1, 2)]
    assert [q.high for q in found.values()] == [11.0, 22.0]


COMMITTED = [*sorted(RESULTS.glob("cpu*.json")), RESULTS / "regression_gate.json"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_equal_themselves(path, run):
    result = results.read(path)
    if not flatten(result):
        pytest.skip("rates only")
    code, out, report = run(result, result)
    assert code == 0 and not report["worse"] + report["better"]
    assert report["unchanged"] == len(flatten(result)) and f"{report['unchanged']} unchanged" in out


def test_worse_better_and_noise(run):
    a, b = step_result(), step_result()
    arms = b["step"][0]["variants"]
    arms["sparse"].update(times(120.0))  # slower by 20 %, quartiles apart
    arms["dense nchw"].update(times(270.0), saved_bytes=9001)  # faster; one byte more
    b["ops"]["atto"]["rows"][0]["variants"]["sparse"] = times(2.5, 0.6)  # slower by 25 %, within the noise
    b["ops"]["atto"]["rows"][1]["variants"]["sparse"] = times(2.09, 0.0)  # 4.5 %, below the threshold
    a["ops"]["atto"]["rows"][1]["variants"]["sparse"] = times(2.0, 0.0)
    arms["sparse"]["peak"]["bytes"] = 5100  # 2 % of resident memory
    code, out, report = run(a, b)
    assert code == 1
    assert keys(report["worse"]) == ["step / atto / sparse / median_ms", "step / atto / dense nchw / saved_bytes"]
    assert keys(report["better"]) == ["step / atto / dense nchw / median_ms"]
    assert report["worse"][0]["change"] == pytest.approx(0.2) and report["unchanged"] == 4
    assert "2 worse, 1 better, 4 unchanged, 0 only in A, 0 only in B" in out and "Warning" not in out
    assert keys(run(a, b, "--threshold", "4")[2]["worse"])[1] == "ops / atto / block C=40 s=4 / sparse / median_ms"
    assert keys(run(a, b, "--only", "stable")[2]["worse"]) == ["step / atto / dense nchw / saved_bytes"]
    assert keys(run(a, b, "--only", "time")[2]["worse"]) == ["step / atto / sparse / median_ms"]
    assert run(b, b)[0] == 0


def test_throughput_is_better_when_higher(run):
    def result(rate):
        sizes = [{"model": "tiny", "variants": {"cpu": {"images_per_s": rate}}}]
        return {"format": 2, "kind": "figure6", "machine": MACHINE, "parameters": {}, "left_out": {}, "sizes": sizes}

    assert run(result(100), result(120))[2]["better"] and run(result(100), result(80))[0] == 1


def test_from_nothing_is_worse(run):
    a, b = step_result(), step_result()
    a["step"][0]["variants"]["sparse"]["saved_bytes"] = 0
    code, out, report = run(a, b)
    assert code == 1 and report["worse"][0]["change"] is None and "from 0" in out


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("machine", "cpu", "another"),
        ("machine", "torch", "2.14.0"),
        ("machine", "threads", 4),
        ("machine", "environment", {"OMP_PROC_BIND": "true"}),
        ("parameters", "batch_size", 16),
    ],
)
def test_times_of_other_machines_do_not_count(where, name, value, run):
    a, b = step_result(), step_result()
    b[where][name] = value
    b["step"][0]["variants"]["sparse"].update(times(200.0))
    code, out, report = run(a, b)
    assert code == 0 and "Warning" in out and f"{name}: " in out and f"{value} in B" in out
    assert keys(report["not_comparable"]) == ["step / atto / sparse / median_ms"] and "1 not comparable" in out
    assert run(a, b, "--ignore-machine")[0] == 1
    b["step"][0]["variants"]["sparse"]["saved_bytes"] += 1  # what is counted counts on every machine
    assert run(a, b)[0] == 1


def test_what_only_one_has_is_listed(run):
    a, b = step_result(), step_result()
    b["parameters"]["repeats"], b["parameters"]["models"] = 3, []  # no difference in the work
    b["step"][0]["variants"]["triton"] = b["step"][0]["variants"].pop("dense nchw")
    code, out, report = run(a, b)
    assert code == 0 and "Warning" not in out and "2 only in A, 2 only in B" in out
    assert "only in A: step / atto / dense nchw / median_ms" in out and len(report["only_in_b"]) == 2


def test_bad_input(tmp_path, capsys):
    good = tmp_path / "good.json"
    good.write_text(json.dumps(step_result()))
    other = copy.deepcopy(step_result())
    other["step"][0]["model"], other["ops"] = "huge", {}
    contents = {
        "text.json": ("no json", "is not valid JSON"),
        "list.json": ("[1, 2]", "expected an object"),
        "empty.json": (json.dumps({**step_result(), "step": [], "ops": {}}), "expected times, bytes or counts in it"),
        "other.json": (json.dumps(other), "have no number in common"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_text(content)
        assert main(["compare", str(good), str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert main(["compare", str(good), str(tmp_path / "absent.json")]) == 2
    assert "absent.json cannot be read: No such file or directory" in capsys.readouterr().err
    assert main(["compare", str(good), str(good), "--json", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(good), str(good), "--threshold", "-1"])
    assert caught.value.code == 2 and "expected a percentage, 0 or more, got '-1'" in capsys.readouterr().err


def test_times_beside_a_control_that_is_off_do_not_count(run):
    a, b = step_result(), step_result()
    b["step"][0]["variants"]["sparse"].update(times(200.0))
    b["step"][0]["control"] = {"of": "dense nchw", "ratio": 1.2, "tolerance": 0.03, "valid": False}
    code, out, report = run(a, b)
    assert code == 0 and "B: INVALID: a copy of dense nchw took 1.200 times as long" in out
    assert keys(report["not_comparable"]) == ["step / atto / sparse / median_ms"]
    b["step"][0]["control"] = {"of": "dense nchw", "ratio": 1.01, "tolerance": 0.03, "valid": True}
    assert run(a, b)[0] == 1
