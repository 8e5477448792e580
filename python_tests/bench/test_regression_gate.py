"""bench gate: what it catches, on the smallest model, and that the committed baseline holds."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import convnextv2_kernels as ck
from bench.__main__ import main
from bench.gate import command
from bench.gate.judge import differing
from convnextv2_kernels.backends.cpu import CPUBackend
from convnextv2_kernels.ops import norm

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "op / convnextv2_block cpu / "

no_extension = ck.backends.unsupported_reason("cpu", "cpu", torch.float32)
pytestmark = pytest.mark.skipif(no_extension is not None, reason=str(no_extension))


@pytest.fixture
def gate(monkeypatch):
    """The program, set to one model."""
    monkeypatch.setattr(command.steps, "SIZES", ("atto",))
    return command


@pytest.fixture
def baseline(gate):
    """The committed baseline, cut to what ``gate`` measures."""
    result = json.loads(gate.BASELINE.read_text())
    result["step"] = {name: numbers for name, numbers in result["step"].items() if "convnextv2_atto" in name}
    return result


@pytest.fixture
def check(gate, tmp_path, capsys):
    """Runs the program against a baseline; returns (exit code, standard output, standard error)."""

    def check(baseline, *options):
        path = tmp_path / "baseline.json"
        path.write_text(baseline if isinstance(baseline, str) else json.dumps(baseline))
        code = main(["gate", "--baseline", str(path), *(options or ("--skip-instructions",))])
        return code, *capsys.readouterr()

    return check


@pytest.fixture
def only_ops(gate, monkeypatch, baseline):
    """The gate on two ops, for speed, and their baseline."""
    names = ("convnextv2_block", "layer_norm")
    monkeypatch.setattr(gate.operators, "OPS", names)
    monkeypatch.setattr(gate.operators, "DENSE", ())
    monkeypatch.setattr(gate.steps, "measure", lambda sizes, log: {"none": {"saved_bytes": 0}})
    baseline["step"] = {"none": {"saved_bytes": 0}}
    monkeypatch.setattr(gate.host, "measure", lambda log: {"none": {"dispatches": 0}})
    baseline["host"] = {"none": {"dispatches": 0}}
    baseline["op"] = {name: numbers for name, numbers in baseline["op"].items() if name.split()[0] in names}
    baseline["op"] = {name: numbers for name, numbers in baseline["op"].items() if " dense " not in name}
    return baseline


@pytest.mark.thorough  # `make test` runs the gate itself
def test_the_committed_baseline_holds(check, baseline, gate):
    code, out, err = check(baseline)
    assert code == 0, out + err
    assert "not compared" in out and "--skip-instructions was given" in out
    if differing(("torch",), baseline["software"], {"torch": torch.__version__}) is None:
        counted = sum(key.split(" / ")[0] in ("step", "op", "host") for key in gate.flat(baseline))
        assert f"{counted} quantities compared, 0 worse or missing, 0 better" in out


def test_every_op_and_both_kinds_of_kernels_are_counted(gate, baseline):
    assert set(gate.operators.OPS) == set(ck.ops.__all__)
    assert {name.removesuffix(" dense cpu").removesuffix(" cpu") for name in baseline["op"] if "cpu" in name} == set(
        ck.ops.__all__
    )
    kernels = " ".join([*baseline["instructions"], *baseline["instructions_c_library"]])
    for name in ("conv_forward", "conv_weight_grad", "layer_norm_backward", "mlp_backward_pointwise", "gather_patches"):
        assert name in kernels


def test_one_more_saved_tensor_is_caught(check, only_ops, monkeypatch):
    function = norm._LayerNorm
    forward, backward = function.forward, function.backward

    def greedy(ctx, x, *args):
        y = forward(ctx, x, *args)
        ctx.save_for_backward(*ctx.to_save, x + 1)
        return y

    class Context:
        """Hides the extra tensor from backward."""

        def __init__(self, ctx):
            self._ctx = ctx

        saved_tensors = property(lambda self: self._ctx.saved_tensors[:-1])

        def __getattr__(self, name):
            return getattr(self._ctx, name)

    monkeypatch.setattr(function, "forward", staticmethod(greedy))
    monkeypatch.setattr(function, "backward", staticmethod(lambda ctx, *grads: backward(Context(ctx), *grads)))
    code, out, _ = check(only_ops)
    extra = 12 * 4 * 4 * 16 * 4
    found = only_ops["op"]["layer_norm cpu"]["saved_bytes"]
    assert code == 1
    assert f"WORSE: op / layer_norm cpu / saved_bytes: baseline {found:,}, found {found + extra:,}, allowed" in out
    assert "WORSE: op / layer_norm cpu / aten_calls" in out and BLOCK not in out


def test_one_more_operator_is_caught(check, only_ops, monkeypatch):
    kernel = CPUBackend.column_sum
    monkeypatch.setattr(CPUBackend, "column_sum", lambda self, x: kernel(self, x) + 0 * kernel(self, x))
    code, out, _ = check(only_ops)
    calls = only_ops["op"]["convnextv2_block cpu"]["own_calls"]
    assert code == 1 and f"WORSE: {BLOCK}own_calls: baseline {calls:,}, found {calls + 1:,}" in out
    assert f"{BLOCK}saved_bytes" not in out


def test_numbers_that_differ_from_the_baseline(check, only_ops):
    numbers = only_ops["op"]["convnextv2_block cpu"]
    numbers["saved_bytes"] -= 1
    numbers["peak_bytes"] += 1
    code, out, _ = check(only_ops)
    assert code == 1 and out.count("WORSE") == 1
    assert f"WORSE: {BLOCK}saved_bytes: baseline 943, found 944, allowed up to 943 (tolerance 0 %" in out
    assert f"better than the baseline: {BLOCK}peak_bytes" in out and "--update" in out
    numbers["saved_bytes"] += 1
    assert check(only_ops)[0] == 0  # only better: told, no failure


def test_quantities_that_vanish_or_appear_fail(check, only_ops):
    only_ops["op"]["a lost op cpu"] = {"saved_bytes": 5}
    del only_ops["op"]["layer_norm reference"]
    code, out, _ = check(only_ops)
    assert code == 1 and "2 worse or missing" in out
    assert "WORSE: op / a lost op cpu / saved_bytes: in the baseline (5), but it was not measured" in out
    assert "WORSE: op / layer_norm reference / saved_bytes: measured (1,536), but not in the baseline" in out


def test_another_pytorch_is_compared_where_it_can_be(check, only_ops):
    only_ops["software"]["torch"] = "2.99.1+cpu"
    numbers = only_ops["op"]["convnextv2_block cpu"]
    numbers["peak_bytes"] = numbers["aten_calls"] = 1
    code, out, _ = check(only_ops)
    assert code == 0 and f"peak_bytes: torch: baseline is 2.99.1+cpu, here {torch.__version__}" in out
    numbers["saved_bytes"] = numbers["own_calls"] = 1
    code, out, _ = check(only_ops)
    assert code == 1 and out.count("WORSE") == 2


def test_instructions_have_a_tolerance_and_need_their_compiler(gate, baseline):
    name = next(iter(baseline["instructions"]))
    found = json.loads(json.dumps(baseline))
    before = baseline["instructions"][name]["instructions"]
    found["instructions"][name]["instructions"] = int(1.009 * before)
    assert not gate.judge(baseline, found, {}).worse
    found["instructions"][name]["instructions"] = int(1.02 * before)
    (sentence,) = gate.judge(baseline, found, {}).worse
    assert name in sentence and "tolerance 1 %" in sentence
    found["instructions"][name]["instructions"] = int(0.9 * before)
    verdict = gate.judge(baseline, found, {})
    assert not verdict.worse and len(verdict.better) == 1
    found["software"]["compiler"] = "gcc 13.1.0"
    verdict = gate.judge(baseline, found, {})
    assert not verdict.better and any("baseline is gcc 12.2.0, here gcc 13.1.0" in note for note in verdict.notes)
    found["software"]["compiler"] = "gcc 12.9.0"
    found["software"]["c_library"] = "glibc 9"
    verdict = gate.judge(baseline, found, {})
    assert len(verdict.better) == 1 and len(verdict.notes) == 1  # only what is mostly the C library's is left out


def test_callgrind_counts_call_by_call(gate):
    output = "compiler gcc 12.2.0\nbuild optimized\nisa avx2\ncall one\ncall-c-library two\n"
    facts, sections = gate.instructions._assembled(output, [10, 20], {})
    assert facts == {"compiler": "gcc 12.2.0", "isa": "avx2"}
    assert sections["instructions_c_library"] == {"two": {"instructions": 20}}
    for text, totals, message in (
        (output, [10], "counted 1 calls and the driver made 2"),
        (output, [10, 0], "expected the same"),
        (output.replace("optimized", "for debugging"), [10, 20], "expected a Release build"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gate.instructions._assembled(text, totals, {})


def test_instructions_of_a_built_driver(gate, baseline):
    driver = ROOT / "build" / "cmake" / "instructions"
    if shutil.which("valgrind") is None or not driver.exists():
        pytest.skip("needs valgrind and the driver, which `make ctest` builds")
    facts, sections = gate.instructions.count(driver)
    assert {**facts, "torch": "", "python": ""}.keys() == baseline["software"].keys()
    assert {k: v.keys() for k, v in sections.items()} == {k: baseline[k].keys() for k in sections}
    assert min(numbers["instructions"] for section in sections.values() for numbers in section.values()) > 1000


def test_without_valgrind(gate, check, only_ops, monkeypatch, tmp_path):
    monkeypatch.setattr(gate.instructions.shutil, "which", lambda *args, **kwargs: None)
    code, out, _ = check(only_ops, "--build", str(tmp_path))
    assert code == 0 and "x instructions: valgrind is not installed" in out
    code, _, err = check(only_ops, "--require-instructions")
    assert code == 2 and "--require-instructions was given, but valgrind is not installed" in err
    code, _, err = check(only_ops, "--update")
    assert code == 2 and "would drop the instructions from the baseline" in err


def test_bad_baselines(check, gate, baseline):
    def without(name):
        return {key: value for key, value in baseline.items() if key != name}

    wrong = json.loads(json.dumps(baseline))
    wrong["op"]["layer_norm cpu"]["saved_bytes"] = "many"
    for given, message in (
        ("{", "is not valid JSON"),
        (without("kind"), "is not a result of this gate"),
        (without("instructions"), "lacks instructions"),
        (without("software"), "lacks software"),
        (wrong, "has 'many' for 'op / layer_norm cpu / saved_bytes'"),
        ({**baseline, "parameters": {"batch_size": 3}}, "--baseline is of {'batch_size': 3}"),
    ):
        code, out, err = check(given)
        assert code == 2 and message in err and not out
    assert main(["gate", "--baseline", "nowhere/b.json"]) == 2


def test_one_more_python_call_and_one_more_dispatch_are_caught(gate, baseline, monkeypatch):
    found = gate.host.measure()
    assert set(found) == set(baseline["host"]) and all(n > 0 for counts in found.values() for n in counts.values())
    assert found == gate.host.measure()  # every run counts the same
    forward = ck.nn.ConvNeXtV2Block.forward

    def slower(self, x, layout=None):
        return forward(self, x, layout) + 0

    monkeypatch.setattr(ck.nn.ConvNeXtV2Block, "forward", slower)
    counts = gate.host.measure()["packed block, forward"]
    before = found["packed block, forward"]
    assert counts["python_calls"] > before["python_calls"] and counts["dispatches"] > before["dispatches"]
