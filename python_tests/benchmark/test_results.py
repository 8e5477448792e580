"""One format: every committed file is read, those of older formats too."""

import json
from pathlib import Path

import pytest

from convnextv2_kernels.benchmark import results

COMMITTED = sorted((Path(__file__).resolve().parents[2] / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_file_is_read(path):
    found = results.read(path)
    assert found["format"] == results.FORMAT and found["kind"] in results.KINDS
    if found["kind"] in results.TIMED:
        assert found["allocator"]["mode"] in ("constant", "default")
        assert found["parameters"]["allocator"] == found["allocator"]["mode"]
    text = json.dumps(found)
    if found["kind"] in ("figure6", "ops", "scaling", "fused"):
        assert '"arms"' not in text and '"variants"' in text
    assert results.upgraded(found) == found


def test_a_file_of_format_1_in_todays_words():
    old = {
        "kind": "figure6",
        "machine": {"environment": {"MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_TRIM_THRESHOLD_": "1"}},
        "parameters": {"seed": 0},
        "left_out": {},
        "sizes": [
            {
                "gate": {"results": 1},
                "arms": {
                    "sparse cpu": {"variant": None, "median_ms": 1.0},
                    "dense nchw linear compile": {
                        "variant": {"layout": "nchw", "pointwise": "linear", "compiled": True},
                        "median_ms": 2.0,
                    },
                },
            }
        ],
    }
    found = results.upgraded(old)
    (size,) = found["sizes"]
    assert size["correctness"] == {"results": 1} and "control" not in size
    ours, dense = size["variants"].values()
    assert ours == {"baseline": None, "execution": "eager", "median_ms": 1.0}
    assert dense["baseline"] == {"layout": "nchw", "pointwise": "linear"} and dense["execution"] == "compile"
    assert found["allocator"]["mode"] == found["parameters"]["allocator"] == "constant"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is not valid JSON"),
        ("[1]", "expected an object"),
        ('{"kind": "nonsense"}', "found 'nonsense'"),
        ('{"kind": "scaling", "machine": {}, "parameters": {}}', "expected the keys series in a result of kind"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(results.NotAResult, match=message):
        results.read(path)
    with pytest.raises(results.NotAResult, match="cannot be read: No such file"):
        results.read(tmp_path / "absent.json")
