import json

import pytest

from convnextv2_kernels.benchmark import compare_fcmae_step, machine
from convnextv2_kernels.benchmark.baseline import baselines
from convnextv2_kernels.benchmark.results import write
from convnextv2_kernels.cli.bench import main, parse_options

TINY_RUN = ["--quick", "--img-size", "64", "--batch-size", "1", "--repeats", "2"]


@pytest.mark.thorough
def test_run_leaves_one_json_and_one_picture(tmp_path, capsys):
    assert main([*TINY_RUN, "--output", str(tmp_path)]) == 0
    report, picture = sorted(tmp_path.iterdir())
    assert report.suffix == ".json" and picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(report.read_text())
    assert result["parameters"]["img_size"] == 64
    assert str(tmp_path) not in report.read_text()
    (step,) = result["step"]
    variants = step["variants"]
    assert len(variants) == 1 + len(baselines())
    assert all(len(variant["samples_ms"]) == 2 for variant in variants.values())
    fastest = variants[step["ratios"]["fastest_dense"]]
    assert step["ratios"]["throughput"] == pytest.approx(fastest["median_ms"] / variants["sparse"]["median_ms"])
    assert variants["sparse"]["saved_bytes"] < fastest["saved_bytes"]
    assert variants["sparse"]["peak"]["bytes"] is None or variants["sparse"]["peak"]["bytes"] > 0
    assert step["control"]["of"] in variants and result["allocator"]["mode"] == "constant"
    assert "fastest dense variant" in capsys.readouterr().out


def test_spent_budget_skips_by_name(tmp_path, capsys):
    arguments = [*TINY_RUN, "--compile", "--time-budget", "0.001", "--output", str(tmp_path)]
    assert main(arguments) == 0
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert len(result["step"][0]["skipped"]) == len(baselines())
    assert "skipped: time budget" in capsys.readouterr().out


def test_quick_gives_way_to_explicit_options():
    quick = parse_options(["--quick"])
    assert (quick.models, quick.batch_size, quick.compile) == (("convnextv2_atto",), 2, False)
    own = parse_options(["--quick", "--models", "tiny", "convnextv2_tiny", "--compile"])
    assert (own.models, own.batch_size, own.compile) == (("convnextv2_tiny",), 2, True)
    full = parse_options([])
    assert full.compile and full.repeats == 10 and full.allocator == "constant"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "giant"], "expected one of convnextv2_atto"),
        (["--img-size", "100"], "expected a side in pixels, a multiple of 32, got '100'"),
        (["--batch-size", "0"], "expected a whole number above 0, got '0'"),
        (["--repeats", "few"], "expected a whole number above 0, got 'few'"),
        (["--time-budget", "-3"], "expected a number of seconds above 0, got '-3'"),
        (["--time-budget", "nan"], "expected a number of seconds above 0, got 'nan'"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--img-size", "32"], "the only patch of 32x32 pixels"),
        (
            ["--figure6", "--img-size", "64", "--mask-ratio", "0.8"],
            "--mask-ratio 0.8 hides all 4 patches of 64x64 pixels",
        ),
    ],
)
def test_nothing_is_timed_where_no_patch_is_visible(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "expected --" in error and error.count("\n") == 1


def test_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "taken"
    path.write_text("")
    assert main([*TINY_RUN, "--output", str(path)]) == 2
    assert f"--output {path} cannot be used as a folder" in capsys.readouterr().err


def test_compare_for_the_demo():
    result = compare_fcmae_step("convnextv2_atto", 1, img_size=64, repeats=1)
    assert result["time_ratio"] == result["dense_ms"] / result["sparse_ms"]
    assert result["bytes_ratio"] == result["dense_bytes"] / result["sparse_bytes"] > 1
    assert result["dense_variant"].endswith("eager")


def test_compare_refuses_bad_sizes():
    with pytest.raises(ValueError, match="img_size is 100, expected a positive multiple of 32"):
        compare_fcmae_step("convnextv2_atto", 1, img_size=100)
    with pytest.raises(ValueError, match="batch size is 0, expected at least 1"):
        compare_fcmae_step("convnextv2_atto", 0)


def test_samples_take_one_line(tmp_path):
    path = tmp_path / "report.json"
    value = {"samples": [1.5, 2.0], "names": ["a", "b"], "nothing": []}
    write(path, value)
    text = path.read_text()
    assert '"samples": [ 1.5, 2.0 ]' in text
    assert json.loads(text) == value


def test_machine_description_is_json(tmp_path):
    description = machine.describe()
    assert json.loads(json.dumps(description)) == description
    assert description["backends"]["reference"]["float32"] == "yes"


def test_caches_are_read_from_sysfs(tmp_path):
    folder = tmp_path / "index2"
    folder.mkdir()
    for name, text in {"level": "2\n", "type": "Unified\n", "size": "1024K\n"}.items():
        (folder / name).write_text(text)
    (tmp_path / "index3").mkdir()
    assert machine.cpu_caches(tmp_path) == {"L2 Unified": "1024K"}


@pytest.mark.parametrize(("flag", "mode"), [("--ops", "ops"), ("--scaling", "scaling"), ("--compare", "compare")])
def test_modes_that_moved_say_where_to(flag, mode, capsys):
    assert main([flag, "A.json"]) == 2
    said = capsys.readouterr().err
    assert f"bench {flag} is now `python -m bench {mode}`" in said and said.count("\n") == 1
