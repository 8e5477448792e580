"""JSON files of results, plans and builds that were edited or damaged: one sentence or one warning, never a traceback,
never used in silence."""

import json
import math
import os
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import RESULTS, tables
from bench.compare import main as compare
from bench.gate.command import BadInput, read_baseline
from bench.gpu.results import Results
from convnextv2_kernels import backends
from convnextv2_kernels.analysis.results import file_name, write_rows
from convnextv2_kernels.backends import native
from convnextv2_kernels.benchmark import report, results
from convnextv2_kernels.cli import main
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.settings import current

# Content of any file of ours, and what is said of it.
TEXTS = {
    "nothing": ("", "is not valid JSON"),
    "half": ('{"kind": "step", "st', "is not valid JSON"),
    "no UTF-8": (b'{"kind": "\xff"}', "is not valid JSON"),
    "deep": ("[" * 100_000, "is nested more than 32 deep"),
    "deep within": ('{"kind": ' + "[" * 40 + "]" * 40 + "}", "is nested more than 32 deep"),
    "400 digits": ('{"kind": ' + "9" * 400 + "}", "an integer of 400 digits is beyond 64 bits"),
    "10000 digits": ('{"kind": ' + "9" * 10_000 + "}", "an integer of 10000 digits is beyond 64 bits"),
}
JSON = {
    "a list": [],
    "a number": 5,
    "a text": '"step"',
    "null": None,
    "no kind": {},
    "an unknown kind": {"kind": "\x1b[2J\udc80"},
    "a list for the kind": {"kind": ["step"]},
    "a dict for the kind": {"kind": {"a": 1}},
    "no parts": {"kind": "step"},
    "a list for the machine": {"machine": []},
    "null for the machine": {"machine": None},
    "a text for the parameters": {"parameters": "x"},
    "a list for the allocator": {"allocator": ["constant"]},
    "no finite number": {"parameters": {"x": [float("inf")]}},
    "a text for the steps": {"step": "abc"},
    "a dict for the steps": {"step": {"a": 1}},
    "texts for the steps": {"step": ["a"]},
    "a control without parts": {"step": [{"control": {}}]},
    "a control of texts": {"step": [{"control": {"of": "x", "valid": False, "ratio": "1", "tolerance": 0.1}}]},
    "a control without a reason": {"step": [{"control": {"of": "x", "valid": False, "ratio": None}}]},
}


def write(path: Path, content: object) -> Path:
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def step_result(**changes: object) -> dict:
    """A result that ``bench compare`` takes."""
    variants = {"sparse": {"median_ms": 2.0, "q1_ms": 1.9, "q3_ms": 2.1, "saved_bytes": 100}}
    return {
        "format": 2,
        "kind": "step",
        "machine": {"cpu": "x", "environment": {}},
        "parameters": {"dtype": "float32"},
        "allocator": {"mode": "default"},
        "step": [{"model": "convnextv2_atto", "variants": variants, "control": None}],
        **changes,
    }


@pytest.mark.parametrize("name", [*TEXTS, *JSON])
def test_a_file_that_is_no_result_is_refused_in_a_sentence(name, tmp_path):
    content, says = TEXTS.get(name, (None, "is not a result of this benchmark"))
    if name in JSON:
        part = JSON[name]
        content = step_result(**part) if isinstance(part, dict) and "kind" not in part and part else part
    path = write(tmp_path / "a.json", content)
    good = write(tmp_path / "b.json", step_result())
    for read in (lambda: results.read(path), lambda: compare([str(path), str(good)])):
        with pytest.raises(results.NotAResult) as refused:
            read()
        said = str(refused.value)
        assert str(path) in said and says in said and said.isprintable() and len(said) < 600
    with pytest.raises(results.ResumeError, match="give another --output, or --restart"):
        results.resume(path, step_result(), restart=False)


@pytest.mark.skipif(os.name != "posix", reason="such files are POSIX")
def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name, kind in (("fifo", "FIFO"), ("zero", "device")):
        with pytest.raises(results.NotAResult, match=f"is a {kind}, expected a regular file"):
            results.read(tmp_path / f"{name}.json")


def test_texts_that_no_terminal_shows_are_escaped(tmp_path, capsys):
    odd = "\x1b[2J\udc80"
    one = step_result(machine={"cpu": odd, odd: odd})
    one["step"][0]["variants"][odd] = {"median_ms": 1.0}
    a, b = write(tmp_path / "a.json", one), write(tmp_path / "b.json", step_result())
    assert compare([str(a), str(b), "--json", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr().out
    assert r"\x1b[2J\udc80" in said and "\x1b" not in said
    found = results.read(a)
    assert found["machine"]["cpu"] == r"\x1b[2J\udc80"
    results.write(tmp_path / "again.json", found)
    assert results.read(tmp_path / "again.json") == found
    assert results.resume(a, {**one, "machine": one["machine"]}, restart=False) == found


def test_a_result_with_numbers_out_of_the_ordinary_is_compared(tmp_path, capsys):
    one = step_result()
    row = one["step"][0]["variants"]["sparse"]
    row.update(median_ms=1e308, q1_ms=-1.0, saved_bytes=2**63 - 1, peak_bytes=1e308, x_per_s=1e-308)
    a, b = write(tmp_path / "a.json", one), write(tmp_path / "b.json", step_result())
    for pair in ((a, b), (b, a), (a, a)):
        assert compare([str(path) for path in pair]) in (0, 1)
    assert "saved_bytes" in capsys.readouterr().out


def figure6_command(output: Path) -> list[str]:
    words = "bench --figure6 --models atto --batch-size 1 --img-size 64 --repeats 1 --no-compile --no-peak".split()
    return [*words, "--device", "cpu", "--allocator", "default", "--output", str(output)]


FIGURE6 = {
    "a size without a model": lambda result: result["sizes"].append({"variants": {}}),
    "a size without variants": lambda result: result["sizes"].append({"model": "x", "skipped": {}}),
    "variants in a list": lambda result: result["sizes"].append({"model": "x", "skipped": {}, "variants": [1]}),
    "left out in a list": lambda result: result.update(left_out=["a"]),
    "a control that is a text": lambda result: result["sizes"].append(
        {"model": "x", "variants": {}, "skipped": {}, "ours": "x", "ratios": {}, "control": "x"}
    ),
}


@pytest.mark.parametrize("name", FIGURE6)
def test_a_benchmark_does_not_resume_what_it_cannot_show(name, tmp_path, monkeypatch, capsys):
    start = step_result(kind="figure6", sizes=[], left_out={})
    start["machine"] = {**start["machine"], "device": "cpu"}
    FIGURE6[name](start)
    path = write(tmp_path / "figure6_default_allocator.json", start)
    before = path.read_bytes()
    monkeypatch.setattr(results, "resume", lambda path, start, restart: results.read(path))
    assert main(figure6_command(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "is not a result of this benchmark" in said and "Traceback" not in said
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["{}", "[1]", '{"kind": "figure6", "machine": {}, "parameters": {}, "sizes": [{}]}'])
def test_tables_of_a_damaged_result_are_not_written(damage, tmp_path, monkeypatch):
    path = tmp_path / "figure6.json"
    path.write_text(damage)
    monkeypatch.setattr(tables, "FIGURE6", path)
    with pytest.raises(UserError, match="is not a result of this benchmark|of whose parts one is missing"):
        tables.main([])


def test_a_table_of_other_parts_is_a_sentence(tmp_path, monkeypatch):
    result = json.loads((RESULTS / "cuda_resources.json").read_text())
    result["kernels"] = {"a": {"registers": 5}}
    monkeypatch.setattr(tables, "RESOURCES", write(tmp_path / "r.json", result))
    with pytest.raises(UserError, match="of whose parts one is missing or another"):
        tables.main(["--check"])


@pytest.mark.parametrize("name", [*TEXTS, "a list"])
def test_a_baseline_that_is_none_is_refused(name, tmp_path):
    content = TEXTS[name][0] if name in TEXTS else []
    with pytest.raises(BadInput) as refused:
        read_baseline(write(tmp_path / "base.json", content))
    assert str(refused.value).startswith("regression gate: --baseline") and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "content", [*(text for text, _ in TEXTS.values()), "[]", "{}", '{"torch": 5}', '{"torch": null}']
)
def test_a_note_of_the_build_that_is_none_ends_no_import(content, tmp_path, monkeypatch):
    (tmp_path / "backends").mkdir()
    write(tmp_path / "_C.build.json", content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "backends" / "native.py"))
    assert native._built_for() == "an unknown PyTorch"


def test_names_that_are_no_text_are_written(tmp_path):
    rows = [{"name": "\udce9.png", "value": math.nan}]
    write_rows(tmp_path / "rows.csv", rows)
    assert (tmp_path / "rows.csv").read_bytes() == b"name,value\n\\udce9.png,\n"
    assert file_name("\udce9/../x" * 100).isprintable() and len(file_name("a" * 1000)) == 100
    report.write_csv(tmp_path / "empty.csv", {"sizes": []})


# -- measured plans


pytest.importorskip("triton")

from convnextv2_kernels.backends.triton import mlp, plans  # noqa: E402
from convnextv2_kernels.backends.triton.plans import Plan, Shape, Tile  # noqa: E402

SHAPE = Shape(torch.bfloat16, 96, 384, 96, 1216)
TILE = [128, 64, 64, 4, 2]
ROW = {"key": ["bfloat16", 96, 384, 96, 11], "source": "measured by tune", "first": TILE, "second": TILE}
HERE = {"gpu": "Test GPU 1", "driver": "1"}


def with_tile(*values: object) -> dict:
    return {"first": list(values)}


ROWS = {
    "no stages": (with_tile(128, 64, 64, 4, 0), "plans[0].first.stages is 0, expected one of"),
    "stages below 0": (with_tile(128, 64, 64, 4, -1), "plans[0].first.stages is -1"),
    "many stages": (with_tile(128, 64, 64, 4, 10**6), "plans[0].first.stages is 1000000"),
    "1024 warps": (with_tile(128, 64, 64, 1024, 2), "plans[0].first.warps is 1024, expected one of"),
    "3 warps": (with_tile(128, 64, 64, 3, 2), "plans[0].first.warps is 3"),
    "no warps": (with_tile(128, 64, 64, 0, 2), "plans[0].first.warps is 0"),
    "2^40 rows": (with_tile(2**40, 64, 64, 4, 2), "plans[0].first.rows is 1099511627776"),
    "rows below 0": (with_tile(-128, 64, 64, 4, 2), "plans[0].first.rows is -128"),
    "1 row": (with_tile(1, 64, 64, 4, 2), "plans[0].first.rows is 1,"),
    "100 columns": (with_tile(128, 100, 64, 4, 2), "plans[0].first.columns is 100"),
    "no depth": (with_tile(128, 64, 0, 4, 2), "plans[0].first.depth is 0"),
    "True rows": (with_tile(True, 64, 64, 4, 2), "plans[0].first.rows is true"),
    "rows of a fraction": (with_tile(128.0, 64, 64, 4, 2), "plans[0].first.rows is 128.0"),
    "rows of NaN": (with_tile(math.nan, 64, 64, 4, 2), "plans[0].first.rows is NaN"),
    "rows of text": (with_tile("128", 64, 64, 4, 2), 'plans[0].first.rows is "128"'),
    "rows in a list": (with_tile([128], 64, 64, 4, 2), "plans[0].first.rows is [128]"),
    "four numbers": (with_tile(128, 64, 64, 4), "plans[0].first is [128, 64, 64, 4], expected [rows, columns"),
    "six numbers": (with_tile(128, 64, 64, 4, 2, 1), "plans[0].first is [128, 64, 64, 4, 2, 1]"),
    "a text": ({"first": "abcde"}, 'plans[0].first is "abcde"'),
    "a number": ({"first": 0}, "plans[0].first is 0"),
    "null": ({"first": None}, "plans[0].first is null"),
    "an object": ({"first": {"rows": 1}}, 'plans[0].first is {"rows": 1}'),
    "an unknown kernel": ({"third": TILE}, "plans[0].third is unknown"),
    "a key of text": ({"key": "abcde"}, 'plans[0].key is "abcde"'),
    "a key of lists": ({"key": [["bfloat16"], 96, 384, 96, 11]}, "plans[0].key is"),
    "a key of another dtype": ({"key": ["int8", 96, 384, 96, 11]}, 'plans[0].key is ["int8"'),
    "a key with a width below 0": ({"key": ["bfloat16", -96, 384, 96, 11]}, "plans[0].key is"),
    "a key that is short": ({"key": ["bfloat16", 96]}, "plans[0].key is"),
    "a source that is a number": ({"source": 5}, "plans[0].source is 5, expected a line of text"),
    "a source that no terminal shows": ({"source": "\x1b[2J\udc80"}, r'plans[0].source is "\u001b[2J\udc80"'),
    "a long source": ({"source": "a" * 10_000}, "plans[0].source is"),
}
WHOLE = {
    "a list": ([], "the content is [], expected an object with machine and plans"),
    "no plans": ({"machine": HERE}, "plans is missing"),
    "no machine": ({"plans": []}, "machine is missing"),
    "another machine": ({"machine": {"gpu": "Test GPU 2"}, "plans": []}, 'machine is {"gpu": "Test GPU 2"}, expected'),
    "plans in an object": ({"machine": HERE, "plans": {}}, "plans is {}, expected a list"),
    "a plan in a list": ({"machine": HERE, "plans": [[]]}, "plans[0] is [], expected an object"),
    "a plan without a key": ({"machine": HERE, "plans": [{"source": "x"}]}, "plans[0].key is missing"),
    "something more": ({"machine": HERE, "plans": [], "more": 1}, "more is unknown"),
}
CACHES = {
    **TEXTS,
    **{name: ({"machine": HERE, "plans": [{**ROW, **change}]}, says) for name, (change, says) in ROWS.items()},
    **WHOLE,
}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The file of plans of a machine that is none."""
    monkeypatch.setattr(current, "cache", tmp_path)
    monkeypatch.setattr(plans, "machine", lambda index=None: HERE)
    monkeypatch.setattr(plans, "family", lambda index=None: "sm_90")
    plans._read.cache_clear()
    plans.forget()
    yield plans.path()
    plans._read.cache_clear()
    plans.forget()


def test_a_sound_cache_is_used(cache):
    write(cache, {"machine": HERE, "plans": [ROW]})
    assert plans.choose(SHAPE) == Plan(first=Tile(*TILE), second=Tile(*TILE), source="measured by tune")
    assert plans.fault() is None


@pytest.mark.parametrize("name", CACHES)
def test_plans_that_no_kernel_takes_are_ignored_with_one_warning(name, cache):
    content, says = CACHES[name]
    write(cache, content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [plans.choose(shape) for shape in (SHAPE, SHAPE, SHAPE._replace(rows_each=300))]
    assert found[0] == plans.from_table(plans.table()["sm_90"], SHAPE)
    assert len(said) == 1
    text = str(said[0].message)
    assert text.startswith("measured plans are ignored, the built-in table is used: ") and str(cache) in text
    assert says in text and text.isprintable() and len(text) < 700
    assert says in plans.fault()
    # "tune" replaces it
    plans.write({SHAPE: Plan(weight=Tile(64, 64, 32, 4, 2), source="measured by tune")})
    assert plans.choose(SHAPE).weight == Tile(64, 64, 32, 4, 2)


@pytest.mark.skipif(os.name != "posix", reason="such files are POSIX")
def test_a_cache_that_is_no_file(cache):
    os.mkfifo(cache)
    with pytest.warns(UserWarning, match="is a FIFO, expected a regular file"):
        assert plans.choose(SHAPE).source != "measured by tune"
    cache.unlink()
    (cache.parent / ".lock").unlink(missing_ok=True)
    os.mkfifo(cache.parent / ".lock")
    with pytest.raises(OSError):  # and does not wait for a reader
        plans.write({SHAPE: plans.UNFUSED})


def test_a_folder_that_is_none_is_a_warning(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(current, "cache", write(tmp_path / "file", "") / "inside")
    with pytest.warns(UserWarning, match="Not a directory"):
        assert plans.choose(SHAPE).source != "measured by tune"


def test_a_plan_that_the_gpu_cannot_hold_is_dropped(cache):
    write(cache, {"machine": HERE, "plans": [ROW]})
    tried = []

    def run(plan: Plan) -> Plan:
        tried.append(plan.source)
        if plan.source == "measured by tune":
            raise mlp.OutOfResources(300_000, 232_448, "shared memory")
        return plan

    with pytest.warns(UserWarning, match=r"for \('bfloat16', 96, .* is ignored.*300000, Hardware limit: 232448"):
        assert mlp.by_plan(SHAPE, None, run).source == tried[1] != "measured by tune"
    assert mlp.by_plan(SHAPE, None, run).source == tried[1] and len(tried) == 3
    # of the table, or given by a test, it is an error
    with plans.using(Plan(source="measured by tune")), pytest.raises(mlp.OutOfResources):
        mlp.by_plan(SHAPE, None, run)


def test_tune_says_that_it_replaces_what_cannot_be_used(cache, monkeypatch):
    from convnextv2_kernels.cli import tune as tuning

    write(cache, "[")
    said = []
    monkeypatch.setattr(tuning, "unavailable", lambda: None)
    monkeypatch.setattr(backends, "automatic", lambda *_: "reference")
    tuning.tune([], 1, said.append)
    assert len(said) == 1 and "will be replaced" in said[0] and str(cache) in said[0]


# -- anything

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def anywhere(value: object, change: object, draw) -> object:
    """``value`` with one place of it changed."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)):
        value = dict(value) if isinstance(value, dict) else list(value)
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        value[key] = anywhere(value[key], change, draw)
        return value
    return change


@pytest.mark.thorough
@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_a_result_holds_is_compared_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    one = step_result()
    one["step"][0]["control"] = {"of": "x", "ratio": 1.2, "tolerance": 0.03, "valid": False}
    a = write(folder / "a.json", json.dumps(anywhere(one, data.draw(ANY), data.draw)))
    b = write(folder / "b.json", step_result())
    for pair in ((a, b), (b, a)):
        try:
            assert compare([*map(str, pair), "--json", str(folder / "c.json")]) in (0, 1)
        except UserError as error:
            assert str(error).isprintable()
    with suppress(results.ResumeError):
        results.resume(a, step_result(), restart=False)


@pytest.mark.thorough
@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_a_cache_holds_is_used_as_it_is_or_ignored(cache, data):
    content = anywhere({"machine": HERE, "plans": [ROW]}, data.draw(ANY), data.draw)
    write(cache, json.dumps(content))
    plans._read.cache_clear()
    plans.forget()
    fault = plans.fault()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = plans.choose(SHAPE)
    assert len(said) == (fault is not None) and (fault is None or fault.isprintable())
    for tile in filter(None, (found.first, found.second)):
        assert all(type(side) is int for side in tile) and 16 <= min(tile[:3]) <= max(tile[:3]) <= 256
        assert 1 <= tile.warps <= 16 and 1 <= tile.stages <= 6


def test_results_of_a_gpu_that_are_none(tmp_path):
    for text, _ in TEXTS.values():
        write(tmp_path / "results.json", text)
        with pytest.raises(UserError, match="holds no stages of an earlier run; give another --out"):
            Results(tmp_path)
